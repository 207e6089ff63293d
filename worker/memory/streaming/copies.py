"""Blocks that do not stay on the device, copied into slots while others are used.

A block comes in one part or in several, which lie at the same places of a slot whatever the block.
A part that has been used frees its place, and the copy of the same part of the next block that uses
the slot begins then: on a stream of its own, ordered by events alone, without ever waiting on the
host. So with three slots two blocks are on their way while one is used, with one slot the first
parts of the next block while the last ones of this are; and the first blocks of the next step are
copied while the last ones of this step are used. On the link copies follow each other in the order
in which parts were given back.

A CUDA graph of a whole step may hold the copies too. The last ones, for the next step's first
blocks, are joined at its end, since no event may cross from one replay to the next; call
`before_replay` before each replay.

What it gave up: copies that a demand could overtake; parts smaller than what is used at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, product
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
    """That computing has waited for copies; on a GPU by a sample of the steps."""
    coded: bool
    """Whether layers are kept in a shorter code, also where none is streamed."""


class _Place:
    """Device memory for one part of a block at a time."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.position: int | None = None
        """Whose part is here, or on its way."""
        self.arriving = False
        """Whether nobody has waited for it yet."""
        self.renew()

    def renew(self) -> None:
        """Events that no CUDA graph has recorded."""
        if self.memory.is_cuda:
            self.free, self.ready = torch.cuda.Event(), torch.cuda.Event()


class Copies:
    """The blocks of the layers that are streamed, each known by its position among them.

    Each goes through `add` once it is filled; then `start`. Their parts are numbered as in
    `Residency.slot_parts`, also those that a block does not have.

    Args:
        residency: which layers they are of.
        device: where they are used. On a CPU copies are plain ones and never overlap.
        prefetch: whether copies begin when their place is free; else each when it is asked for.
        poison: fill a part that is given back with NaN, to show who reads it later: for tests.
    """

    def __init__(
        self, residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
    ) -> None:
        self.residency = residency
        self.poison = poison
        self._device = device
        self._prefetch = prefetch
        self._blocks: list[HostBlock] = []
        self._parts: list[tuple[Tensor, ...]] = []
        """Of each block."""
        self._host_bytes = 0
        self._slots: list[list[_Place]] = []
        """Of each slot, one for each part."""
        self._stream: Any = None
        if prefetch and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        self._computing: Any = None
        """The stream of the step that runs, once for all its parts: to ask torch takes longer than
        to begin a copy, and a prompt's step is often as fast as the host begins its kernels."""
        self._stalls = StallClock(device)
        self._copied = 0
        self.watch: Callable[[Lane, int], AbstractContextManager[None]] | None = None
        """Put around copies and waiting, with the layer; see `recorder`."""

    def add(self, block: HostBlock, sizes: Sequence[int]) -> None:
        """Take the block of the next position: parts of such sizes, one behind the other.

        Of parts behind them it has none; none may be larger than planned. Raises ConfigError if the
        host does not lock its memory.
        """
        planned = self.residency.parts_of(self.residency.streamed[len(self._blocks)])
        sizes = [*sizes, *[0] * (len(planned) - len(sizes))]
        assert block.size == sum(sizes) and all(
            size <= most for size, most in zip(sizes, planned, strict=True)
        ), "the layer is not as it was planned"
        self._blocks.append(block)
        self._parts.append(block.memory.split(sizes))
        self._host_bytes += block.size
        if self._device.type == "cuda":
            block.lock()

    def start(self) -> None:
        """Allocate the slots, and fill them if that is done ahead."""
        sizes = list(self.residency.slot_parts)
        for _ in range(self.residency.slots):
            memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            self._slots.append([_Place(own) for own in memory.split(sizes)])
        self._find_stream()
        if self._stream is not None:
            # Of what was in this memory before, something may still run.
            self._stream.wait_stream(self._computing)
        if self._prefetch:
            for position, part in self._first():
                self._fill(position, part)

    def memory(self, position: int, part: int) -> Tensor:
        """Where a part of the block at a position always comes, uint8."""
        return self._place(position, part).memory

    def acquire(self, position: int, part: int) -> None:
        """Let the part be there for what comes on the stream of this step."""
        place, layer = self._place(position, part), self.residency.streamed[position]
        with self.watched("waiting", layer), self._stalls.waiting(self._computing):
            if place.position != position:  # on demand, or after a step that failed
                self._fill(position, part)
            self._await(place)

    def release(self, position: int, part: int) -> None:
        """Called after its use, or where it is not used: its place goes to the next.

        A copy that is still on its way is not waited for: the next one comes behind it.
        """
        place = self._place(position, part)
        if self.poison:
            place.memory.fill_(POISON)
        place.position = None
        if self._stream is not None:
            place.free.record(self._computing)
        if self._prefetch:
            self._fill(self.residency.next(position), part)

    def begin(self) -> None:
        """Called before each step, on the stream that it runs on."""
        self._find_stream()
        if self._capturing():
            # Recording began with the device idle, so what was on its way has arrived.
            assert not self._prefetch or all(
                place.position == number
                for number, slot in enumerate(self._slots)
                for place in slot
            ), "run a whole step before one is recorded"
            for place in self._places():
                place.arriving = False
        else:
            self._stalls.begin()

    def end(self) -> None:
        """Called after each step."""
        if self._capturing():
            self._join()
            for place in self._places():
                place.renew()

    def before_recording(self) -> None:
        """Let the first blocks be there, as a step that is recorded begins with them.

        A step that failed has left other ones.
        """
        self._find_stream()
        if self._prefetch:
            for number, part in self._first():
                if self._slots[number][part].position != number:
                    self._fill(number, part)
        self._join()

    def before_replay(self) -> None:
        """Let the current stream wait for all copies, as a recorded step begins without them."""
        self.before_recording()
        self._copied += self._host_bytes

    def recording_failed(self) -> None:
        """Forget what a recording that was not finished has begun: nothing of it will run."""
        for place in self._places():
            place.renew()
            place.position, place.arriving = None, False

    def watched(self, lane: Lane, layer: int) -> AbstractContextManager[None]:
        """Put around what a lane does for a layer, so that it is recorded if that is asked for."""
        if self.watch is None or self._capturing():
            return nullcontext()
        return self.watch(lane, layer)

    def use(self) -> StreamUse:
        """What has been done so far."""
        layers, slots, coded = len(self._blocks), len(self._slots), self.residency.working > 0
        sizes = self._host_bytes, self._copied
        return StreamUse(layers, slots, *sizes, self._stalls.seconds(), coded)

    def close(self) -> None:
        """Unlock and release the host's memory; nobody may ask for a block any more."""
        release(self._blocks, self._device)
        self._blocks.clear()
        self._parts.clear()

    def _fill(self, position: int, part: int) -> None:
        """Copy a part of the block at a position into its place."""
        source, place = self._parts[position][part], self._place(position, part)
        target, layer = place.memory[: source.numel()], self.residency.streamed[position]
        if self._stream is None:
            with self.watched("copies", layer):
                target.copy_(source, non_blocking=True)
        else:
            self._stream.wait_event(place.free)
            with self._copying(), self.watched("copies", layer):
                target.copy_(source, non_blocking=True)
            place.ready.record(self._stream)
            place.arriving = True
        place.position = position
        if not self._capturing():
            self._copied += source.numel()

    def _find_stream(self) -> None:
        if self._device.type == "cuda":
            self._computing = torch.cuda.current_stream(self._device)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """As `torch.cuda.stream`, which asks again for the stream that is current."""
        torch.cuda.set_stream(self._stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(self._computing)

    def _await(self, place: _Place) -> None:
        if place.arriving:
            place.ready.wait(self._computing)
            place.arriving = False

    def _join(self) -> None:
        for place in self._places():
            self._await(place)

    def _place(self, position: int, part: int) -> _Place:
        return self._slots[position % len(self._slots)][part]

    def _first(self) -> Iterator[tuple[int, int]]:
        """The parts of the blocks that a step finds in the slots, by position and part."""
        return product(range(len(self._slots)), range(len(self.residency.slot_parts)))

    def _places(self) -> Iterator[_Place]:
        return chain.from_iterable(self._slots)

    def _capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
