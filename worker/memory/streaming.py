"""Layers that do not stay on the device, copied into slots while others run.

A layer that has run frees its slot, and the copy of the next one that uses the slot begins then: on
a stream of its own, ordered by events alone, without ever waiting on the host. So with three slots
two layers are on their way while one runs, and the first layers of the next step are copied while
the last ones of this step run. The tensors of a streamed layer are views of its slot for good:
kernels and CUDA graphs see fixed addresses, and a step gives the same numbers as if all stayed.

A CUDA graph of a whole step may hold the copies too. The last ones, for the next step's first
layers, are joined at its end, since no event may cross from one replay to the next; call
`before_replay` before each replay.

Hooks on the layers start all this, so a decoder knows nothing of it. What it gave up: copies in
pieces, which a demand could overtake, and layers whose parts stay.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.decoder import Decoder
from ..model.packed import large_tensors
from ..model.storage import aligned
from .host import HostBlock
from .residency import Residency
from .stalls import StallClock
from .timeline import Lane

POISON = 0xFF
"""A byte of which every float is NaN."""


@dataclass(frozen=True, slots=True)
class StreamUse:
    """What streaming has done since the start."""

    layers: int
    """That are streamed."""
    slots: int
    host_bytes: int
    """Locked on the host; also what is copied at every step."""
    copied_bytes: int
    stalled_seconds: float
    """That computing has waited for copies."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor of a layer lies in a block, in whatever order its numbers are."""

    tensor: Tensor
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        end = self.offset + self.shape.numel() * self.dtype.itemsize
        return memory[self.offset : end].view(self.dtype).as_strided(self.shape, self.stride)


class _Slot:
    """Device memory for one layer at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        """Position of whose weights are here, or on their way."""
        self.arriving = False
        """Whether computing has not yet waited for them."""
        self.renew()

    def renew(self) -> None:
        """Events that no CUDA graph has recorded."""
        if self.memory.is_cuda:
            self.free, self.ready = torch.cuda.Event(), torch.cuda.Event()


class LayerStream:
    """The layers of one decoder that are streamed.

    Each goes through `take` once it is loaded on the device; then `start`.

    Args:
        residency: which they are.
        device: where they run. On a CPU copies are plain ones and never overlap.
        prefetch: whether copies begin when a slot is free; else each when its layer begins.
        poison: fill a slot that is given back with NaN, to show who reads it later: for tests.
    """

    def __init__(
        self, residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
    ) -> None:
        self.residency = residency
        self._device = device
        self._prefetch = prefetch
        self._poison = poison
        self._positions = {layer: number for number, layer in enumerate(residency.streamed)}
        self._blocks: list[HostBlock] = []
        self._places: list[list[_Place]] = []
        self._slots: list[_Slot] = []
        self._copies: Any = None
        if prefetch and device.type == "cuda":
            self._copies = torch.cuda.Stream(device)
        self._stalls = StallClock(device)
        self._copied = 0
        self.watch: Callable[[Lane, int], AbstractContextManager[None]] | None = None
        """Put around copies and waiting, with the layer; see `recorder`."""

    def take(self, decoder: Decoder, layer: int) -> None:
        """Move a layer's large weights to the host, if it is streamed; layers come in order.

        Raises ConfigError if the host has no memory for them or does not lock it.
        """
        if layer not in self._positions:
            return
        assert self._positions[layer] == len(self._blocks), "layers come in order"
        places, size = _places(decoder.layers[layer])
        assert size == self.residency.blocks[layer], "the layer is not as it was planned"
        block = HostBlock(size)
        self._blocks.append(block)
        self._places.append(places)
        for place in places:
            place.view(block.memory).copy_(place.tensor.detach())
            place.tensor.data = torch.empty(0, dtype=place.dtype, device=self._device)
        if self._device.type == "cuda":
            block.lock()

    def start(self, decoder: Decoder) -> None:
        """Allocate the slots, and let the decoder's layers run from them."""
        size, count = self.residency.slot_bytes, self.residency.slots
        self._slots = [_Slot(size, self._device) for _ in range(count)]
        for position, places in enumerate(self._places):
            memory = self._slots[position % count].memory
            for place in places:
                place.tensor.data = place.view(memory)
        decoder.register_forward_pre_hook(lambda *_: self._begin())
        decoder.register_forward_hook(lambda *_: self._end())
        for layer, position in self._positions.items():
            _hook(self, decoder.layers[layer], position)
        if self._prefetch:
            for position in range(count):
                self._fill(position)

    def before_replay(self) -> None:
        """Let the current stream wait for all copies, as a recorded step begins without them."""
        self._join()
        self._copied += self.residency.copied

    def use(self) -> StreamUse:
        """What has been done so far."""
        copied = self.residency.copied
        layers, slots = len(self._positions), len(self._slots)
        return StreamUse(layers, slots, copied, self._copied, self._stalls.seconds())

    def close(self) -> None:
        """Unlock and release the host's memory; the decoder must not run any more."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for block in self._blocks:
            block.close()
        self._blocks.clear()

    def _begin(self) -> None:
        if self._capturing():
            # Recording began with the device idle, so what was on its way has arrived.
            assert not self._prefetch or all(
                slot.layer == number for number, slot in enumerate(self._slots)
            ), "run a whole step before one is recorded"
            for slot in self._slots:
                slot.arriving = False

    def _end(self) -> None:
        if self._capturing():
            self._join()
            for slot in self._slots:
                slot.renew()

    def acquire(self, position: int) -> None:
        """Called before a streamed layer: its weights are in place for what comes on the stream."""
        slot = self._slots[position % len(self._slots)]
        with self._watched("waiting", position), self._stalls.waiting():
            if slot.layer != position:  # on demand, or after a step that failed
                self._fill(position)
            self._await(slot)

    def release(self, position: int) -> None:
        """Called after it: its slot goes to the next."""
        slot = self._slots[position % len(self._slots)]
        if self._poison:
            slot.memory.fill_(POISON)
        slot.layer = None
        if self._copies is not None:
            slot.free.record()
        if self._prefetch:
            self._fill(self.residency.next(position))

    def _fill(self, position: int) -> None:
        """Copy the block at a position into its slot."""
        block = self._blocks[position].memory
        slot = self._slots[position % len(self._slots)]
        target = slot.memory[: len(block)]
        if self._copies is None:
            with self._watched("copies", position):
                target.copy_(block, non_blocking=True)
        else:
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(slot.free)
                with self._watched("copies", position):
                    target.copy_(block, non_blocking=True)
                slot.ready.record()
            slot.arriving = True
        slot.layer = position
        if not self._capturing():
            self._copied += len(block)

    def _watched(self, lane: Lane, position: int) -> AbstractContextManager[None]:
        if self.watch is None or self._capturing():
            return nullcontext()
        return self.watch(lane, self.residency.streamed[position])

    def _await(self, slot: _Slot) -> None:
        if slot.arriving:
            slot.ready.wait()
            slot.arriving = False

    def _join(self) -> None:
        for slot in self._slots:
            self._await(slot)

    def _capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _hook(stream: LayerStream, layer: nn.Module, position: int) -> None:
    layer.register_forward_pre_hook(lambda *_: stream.acquire(position))
    # Also where the layer fails, or its slot would never be free.
    layer.register_forward_hook(lambda *_: stream.release(position), always_call=True)


def _places(layer: nn.Module) -> tuple[list[_Place], int]:
    """All that a layer streams, and the bytes of a block for it."""
    places, offset = [], 0
    for tensor in large_tensors(layer):
        places.append(_Place(tensor, offset, tensor.shape, tensor.stride(), tensor.dtype))
        offset += aligned(tensor.nbytes)
    return places, offset
