"""All experts on the host, some of them in slots on the device, and whoever is missing fetched.

Which slot an expert gets is decided on the device (`kernels/residence/`), so nothing waits for the
host, and a CUDA graph may hold it all. A stream of its own claims the slots of a layer that has
chosen, fetches what is missing, then claims and fetches ahead what the next layer's router makes of
the same residual. In that order, so that a demand is never behind a guess for a later layer:

- The stream waits for the chosen experts; by then the products of the layer before have run, whose
  slots may now be taken. Those of the running layer are never taken ahead.
- Products wait for their layer's demand alone. What was on the way ahead is before it on the
  stream, so it is never fetched twice.

An expert is never left out or replaced by another. What it gave up: copy engines, which bring more
bytes a second but must be told by a host; and slots for experts of several kinds.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....kernels.residence import reference
from ....kernels.residence.claim import claim
from ....kernels.residence.fetch import Fetcher
from ....kernels.residence.table import POISON, SlotTable
from ...model.decoder import Decoder
from ...model.layers import Experts, FeedForward
from ...model.packed import PackedExperts, large_tensors
from ..host import HostBlock, release
from ..stalls import StallClock
from .module import SlottedExperts, SlottedPackedExperts
from .slots import ExpertSlots


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """What has been asked for since the start, by distinct experts of each layer's step."""

    layers: int
    """That have experts."""
    experts: int
    """Of each."""
    slots: int
    host_bytes: int
    """Locked on the host."""
    hits: int
    """Found in a slot, those that were foreseen too."""
    misses: int
    foreseen: int
    """Fetched ahead."""
    foreseen_used: int
    """Of these, that were chosen then."""
    fetched_bytes: int
    wasted_bytes: int
    """Of what was fetched ahead and not, or not yet, chosen."""
    stalled_seconds: float
    """That computing has waited for experts, where no CUDA graph runs."""


class ExpertCache:
    """The experts of one decoder.

    Each layer goes through `take` once it is loaded on the device; then `start`.

    Args:
        slots: how many there are, for which experts.
        device: where they run. On a CPU all happens in plain order, and nothing overlaps.
        predict: whether experts are fetched ahead.
        poison: fill a slot with NaN before another expert comes: for tests.
    """

    def __init__(
        self, slots: ExpertSlots, device: torch.device, predict: bool, poison: bool = False
    ) -> None:
        self.slots = slots
        self.table = SlotTable.empty(len(slots.layers), slots.experts, slots.slots, device)
        self.predict = predict
        self._device, self._poison = device, poison
        self._blocks: list[HostBlock] = []
        self._modules: list[SlottedExperts] = []
        self._stacks: list[Tensor] = []
        self._bytes: list[Tensor] = []
        self._fetcher: Fetcher | None = None
        self._stalls = StallClock(device)
        self._side: Any = None
        self._ready: Any = None
        if device.type == "cuda":
            # Before other work that could run, as somebody waits for what it brings.
            self._side = torch.cuda.Stream(device, priority=-1)
        self._held: list[tuple[Tensor, Tensor]] = []
        """What the stream may not have read yet: nobody else must get its memory."""

    def take(self, decoder: Decoder, layer: int) -> None:
        """Move a layer's experts to the host; layers come in order.

        Raises ConfigError if the host has no memory for them or does not lock it.
        """
        if layer not in self.slots.layers:
            return
        place = len(self._blocks)
        assert self.slots.layers[place] == layer, "layers come in order"
        feed_forward = decoder.get_submodule(f"layers.{layer}.feed_forward")
        assert isinstance(feed_forward, FeedForward) and feed_forward.experts is not None
        own = feed_forward.experts
        block = HostBlock(
            self.slots.experts * self.slots.expert_bytes,
            "the experts of a layer",
            "or raise knobs.memory_budget so that all stay",
        )
        self._blocks.append(block)
        # Put together where they are, as one copy is faster than many small ones.
        together = torch.zeros(
            (self.slots.experts, self.slots.expert_bytes), dtype=torch.uint8, device=self._device
        )
        for offset, tensor in zip(self.slots.offsets, large_tensors(own), strict=True):
            part = tensor.detach().contiguous().flatten(1).view(torch.uint8)
            together[:, offset : offset + part.shape[1]] = part
        block.memory.copy_(together.flatten())
        if self._device.type == "cuda":
            block.lock()
        feed_forward.experts = self._slotted(own, place)
        self._modules.append(feed_forward.experts)

    def start(self, decoder: Decoder) -> None:
        """Allocate the slots, and let the decoder's experts run from them."""
        for shape, dtype in self.slots.parts:
            stack = torch.empty((self.slots.slots, *shape), dtype=dtype, device=self._device)
            self._stacks.append(stack)
            self._bytes.append(stack.flatten(1).view(torch.uint8))
            if self._poison:
                self._bytes[-1].fill_(POISON)
        if self._side is not None:
            size = self.slots.expert_bytes
            addresses = [
                block.memory.data_ptr() + expert * size
                for block in self._blocks
                for expert in range(self.slots.experts)
            ]
            table = torch.tensor(addresses, dtype=torch.int64, device=self._device)
            self._fetcher = Fetcher(table, self._bytes, self.slots.offsets)
        for module, following in zip(self._modules, [*self._modules[1:], None], strict=True):
            module.put(self._stacks, following)
        for layer, module in zip(self.slots.layers, self._modules, strict=True):
            _hook(decoder.get_submodule(f"layers.{layer}.feed_forward"), module)

    def begin(
        self, place: int, chosen: Tensor, residual: Tensor, following: SlottedExperts | None
    ) -> None:
        """Let the experts `chosen` of the layer at `place` come, then those that follow.

        Args:
            place: of the layer among those with experts.
            chosen: int64 [T, active].
            residual: [T, hidden], by which the next layer's are foreseen.
            following: that layer's experts.
        """
        self._held.append((chosen, residual))
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        with self._aside():
            self._bring(place, chosen, ahead=False)
            if self._side is not None:
                self._ready = self._side.record_event()
            if self.predict and following is not None:
                foreseen = following.foresee(residual)
                self._bring(place + 1, foreseen, ahead=True)

    def await_slots(self, place: int) -> Tensor:
        """int32 [experts]: the slots of that layer, once what it has chosen is there."""
        if self._ready is not None:
            with self._stalls.waiting():
                torch.cuda.current_stream(self._device).wait_event(self._ready)
        del self._held[:-1]  # all before this layer's has been read
        first = place * self.slots.experts
        return self.table.slot_of[first : first + self.slots.experts]

    def before_recording(self) -> None:
        """Nothing of a step that was recorded depends on the one before it."""

    def before_replay(self) -> None:
        """Let the current stream wait for what a step that failed may have left under way."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def recording_failed(self) -> None:
        """Forget what a recording that was not finished has begun: nothing of it will run."""
        self._ready = None
        self._held.clear()

    def use(self) -> ExpertUse:
        """What has been done so far; waits for the device."""
        hits, misses, foreseen, used = self.table.counts.tolist()
        size = sum(own.shape[1] for own in self._bytes)
        return ExpertUse(
            *(len(self.slots.layers), self.slots.experts, self.slots.slots),
            *(self.slots.host_bytes, hits, misses, foreseen, used),
            fetched_bytes=(misses + foreseen) * size,
            wasted_bytes=(foreseen - used) * size,
            stalled_seconds=self._stalls.seconds(),
        )

    def close(self) -> None:
        """Unlock and release the host's memory; the decoder must not run any more."""
        release(self._blocks, self._device)
        self._blocks.clear()

    def _slotted(self, own: Experts, place: int) -> SlottedExperts:
        if isinstance(own, PackedExperts):
            return SlottedPackedExperts(own, self, place)
        return SlottedExperts(own, self, place)

    def _bring(self, place: int, chosen: Tensor, ahead: bool) -> None:
        """Claim slots and fill them; nothing between may fail, or slots would hold nothing."""
        if self._fetcher is not None:
            claim(self.table, place, chosen, ahead)
            if self._poison:
                self._fetcher.fetch(self.table.fetches, poison=True)
            self._fetcher.fetch(self.table.fetches)
            return
        reference.claim(self.table, place, chosen, ahead)
        rows = [block.memory.view(self.slots.experts, -1) for block in self._blocks]
        with self._stalls.waiting():
            for poison in (True, False) if self._poison else (False,):
                reference.fetch(self.table, rows, self._bytes, self.slots.offsets, poison)

    def _aside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)


def _hook(feed_forward: torch.nn.Module, module: SlottedExperts) -> None:
    feed_forward.register_forward_pre_hook(lambda _, inputs: module.begin(inputs[0]))
