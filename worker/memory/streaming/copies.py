"""Blocks that do not stay on the device, copied into slots while others are used.

A block that has been used frees its slot, and the copy of the next one that uses the slot begins
then: on a stream of its own, ordered by events alone, without ever waiting on the host. So with
three slots two blocks are on their way while one is used, and the first blocks of the next step are
copied while the last ones of this step are used.

A CUDA graph of a whole step may hold the copies too. The last ones, for the next step's first
blocks, are joined at its end, since no event may cross from one replay to the next; call
`before_replay` before each replay.

What it gave up: copies in pieces, which a demand could overtake.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..host import HostBlock, release
from ..residency import Residency
from ..stalls import StallClock
from ..timeline import Lane

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
    coded: bool
    """Whether layers are kept in a shorter code, also where none is streamed."""


class _Slot:
    """Device memory for one block at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.position: int | None = None
        """Whose block is here, or on its way."""
        self.arriving = False
        """Whether nobody has waited for it yet."""
        self.renew()

    def renew(self) -> None:
        """Events that no CUDA graph has recorded."""
        if self.memory.is_cuda:
            self.free, self.ready = torch.cuda.Event(), torch.cuda.Event()


class Copies:
    """The blocks of the layers that are streamed, each known by its position among them.

    Each goes through `add` once it is filled; then `start`.

    Args:
        residency: which layers they are of.
        device: where they are used. On a CPU copies are plain ones and never overlap.
        prefetch: whether copies begin when a slot is free; else each when it is asked for.
        poison: fill a slot that is given back with NaN, to show who reads it later: for tests.
    """

    def __init__(
        self, residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
    ) -> None:
        self.residency = residency
        self.poison = poison
        self._device = device
        self._prefetch = prefetch
        self._blocks: list[HostBlock] = []
        self._slots: list[_Slot] = []
        self._stream: Any = None
        if prefetch and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        self._stalls = StallClock(device)
        self._copied = 0
        self.watch: Callable[[Lane, int], AbstractContextManager[None]] | None = None
        """Put around copies and waiting, with the layer; see `recorder`."""

    def add(self, block: HostBlock) -> None:
        """Take the block of the next position.

        Raises ConfigError if the host does not lock its memory.
        """
        position = len(self._blocks)
        assert block.size == self.residency.blocks[self.residency.streamed[position]], (
            "the layer is not as it was planned"
        )
        self._blocks.append(block)
        if self._device.type == "cuda":
            block.lock()

    def start(self) -> None:
        """Allocate the slots, and fill them if that is done ahead."""
        size, count = self.residency.slot_bytes, self.residency.slots
        self._slots = [_Slot(size, self._device) for _ in range(count)]
        if self._prefetch:
            for position in range(count):
                self._fill(position)

    def memory(self, position: int) -> Tensor:
        """The slot that the block at a position always comes into, uint8."""
        return self._slots[position % len(self._slots)].memory

    def acquire(self, position: int) -> Tensor:
        """The slot with the block at a position in place, for what comes on the current stream."""
        slot = self._slots[position % len(self._slots)]
        with self.watched("waiting", self.residency.streamed[position]), self._stalls.waiting():
            if slot.position != position:  # on demand, or after a step that failed
                self._fill(position)
            self._await(slot)
        return slot.memory

    def release(self, position: int) -> None:
        """Called after its use: the slot goes to the next."""
        slot = self._slots[position % len(self._slots)]
        if self.poison:
            slot.memory.fill_(POISON)
        slot.position = None
        if self._stream is not None:
            slot.free.record()
        if self._prefetch:
            self._fill(self.residency.next(position))

    def begin(self) -> None:
        """Called before each step."""
        if self._capturing():
            # Recording began with the device idle, so what was on its way has arrived.
            assert not self._prefetch or all(
                slot.position == number for number, slot in enumerate(self._slots)
            ), "run a whole step before one is recorded"
            for slot in self._slots:
                slot.arriving = False

    def end(self) -> None:
        """Called after each step."""
        if self._capturing():
            self._join()
            for slot in self._slots:
                slot.renew()

    def before_replay(self) -> None:
        """Let the current stream wait for all copies, as a recorded step begins without them."""
        self._join()
        self._copied += self.residency.copied

    def watched(self, lane: Lane, layer: int) -> AbstractContextManager[None]:
        """Put around what a lane does for a layer, so that it is recorded if that is asked for."""
        if self.watch is None or self._capturing():
            return nullcontext()
        return self.watch(lane, layer)

    def use(self) -> StreamUse:
        """What has been done so far."""
        copied = self.residency.copied
        layers, slots, coded = len(self._blocks), len(self._slots), self.residency.working > 0
        return StreamUse(layers, slots, copied, self._copied, self._stalls.seconds(), coded)

    def close(self) -> None:
        """Unlock and release the host's memory; nobody may ask for a block any more."""
        release(self._blocks, self._device)
        self._blocks.clear()

    def _fill(self, position: int) -> None:
        """Copy the block at a position into its slot."""
        block = self._blocks[position].memory
        slot = self._slots[position % len(self._slots)]
        target, layer = slot.memory[: len(block)], self.residency.streamed[position]
        if self._stream is None:
            with self.watched("copies", layer):
                target.copy_(block, non_blocking=True)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(slot.free)
                with self.watched("copies", layer):
                    target.copy_(block, non_blocking=True)
                slot.ready.record()
            slot.arriving = True
        slot.position = position
        if not self._capturing():
            self._copied += len(block)

    def _await(self, slot: _Slot) -> None:
        if slot.arriving:
            slot.ready.wait()
            slot.arriving = False

    def _join(self) -> None:
        for slot in self._slots:
            self._await(slot)

    def _capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
