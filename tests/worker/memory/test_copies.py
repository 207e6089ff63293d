"""Copies as a GPU would order them: two streams and events that only tell what comes before what.

Every two operations on the same part of a slot, of which one writes, must be ordered by events, in
steps that fail too; and what is read must be what was written last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Literal

import pytest
import torch

from conclave.worker.memory.host import HostBlock
from conclave.worker.memory.residency import Residency
from conclave.worker.memory.streaming import copies as module
from conclave.worker.memory.streaming.copies import Copies
from conclave.worker.memory.timeline import Lane

CPU = torch.device("cpu")
LAYERS = 5


@dataclass(eq=False)
class Stream:
    """How many operations of each stream are known to have ended before the next one here."""

    clock: dict["Stream", int] = field(default_factory=dict)

    def join(self, clock: dict["Stream", int]) -> None:
        for stream, count in clock.items():
            self.clock[stream] = max(count, self.clock.get(stream, 0))

    def wait_event(self, event: "Event") -> None:
        self.join(event.clock)

    def wait_stream(self, other: "Stream") -> None:
        self.join(other.clock)


class Event:
    """Nothing before it is recorded first."""

    def __init__(self) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)

    def wait(self, stream: Stream) -> None:
        stream.join(self.clock)


@dataclass(frozen=True, eq=False)
class Operation:
    """A part of a slot is read, or written."""

    what: Literal["read", "write"]
    place: tuple[int, int]
    position: int
    stream: Stream
    clock: dict[Stream, int]

    def before(self, other: "Operation") -> bool:
        return self.clock[self.stream] <= other.clock.get(self.stream, 0)


class Device:
    """Computes and copies; takes the place of torch's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compute = self.current = Stream()
        self.operations: list[Operation] = []
        self.filled = 0, 0
        fill = Copies._fill

        def told_fill(copies: Copies, position: int, part: int) -> None:
            self.filled = position, part
            fill(copies, position, part)

        def renew(place: module._Place) -> None:
            for name in ("free", "ready"):
                setattr(place, name, Event())

        monkeypatch.setattr(Copies, "_fill", told_fill)
        monkeypatch.setattr(module._Place, "renew", renew)
        monkeypatch.setattr(torch.cuda, "set_stream", self.switch)

    def switch(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def watch(self, lane: Lane, layer: int) -> Iterator[None]:
        if lane == "copies":
            assert layer == self.filled[0]  # all layers are streamed
            self.does("write", *self.filled)
        yield

    def does(self, what: Literal["read", "write"], position: int, part: int) -> None:
        own = self.current
        own.clock[own] = own.clock.get(own, 0) + 1
        place = position % self.slots, part
        self.operations.append(Operation(what, place, position, own, dict(own.clock)))

    def copies(self, slots: int, parts: int) -> Copies:
        """Started, with layers of so many parts."""
        sizes = (((256,) * parts),) * LAYERS
        blocks, self.slots = (256 * parts,) * LAYERS, slots
        made = Copies(Residency(blocks, tuple(range(LAYERS)), slots, 1, sizes), CPU, prefetch=True)
        for _ in range(LAYERS):
            made.add(HostBlock(256 * parts), [256] * parts)
        made._stream, made._computing, made.watch = Stream(), self.compute, self.watch
        made.start()
        return made


def run(device: Device, copies: Copies, parts: int, fails: tuple[int, int] | None) -> None:
    """A step; one that fails does not use the part where it does, nor those behind it."""
    for position in range(LAYERS):
        for part in range(parts):
            if (position, part) != fails:
                copies.acquire(position, part)
                device.does("read", position, part)
                copies.release(position, part)
                continue
            for left in range(part, parts):
                copies.release(position, left)
            return


@pytest.mark.parametrize(("slots", "parts"), [(1, 4), (2, 4), (1, 1), (2, 1)])
def test_nothing_is_overwritten_or_early(
    slots: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = product(range(LAYERS), range(parts))
    for fails in (None, *places):
        with monkeypatch.context() as patch:
            device = Device(patch)
            copies = device.copies(slots, parts)
            for each in (None, fails, fails, None, fails, None):
                run(device, copies, parts, each)
            copies.before_replay()
            device.does("read", 0, 0)
        check(device.operations)


def check(operations: list[Operation]) -> None:
    """All are ordered, also every copy before the last one; a part is read as it was written."""
    for one, other in combinations(operations, 2):
        if one.place == other.place and "write" in (one.what, other.what):
            assert one.before(other), (one, other)
    written: dict[tuple[int, int], int] = {}
    for own in operations:
        if own.what == "write":
            written[own.place] = own.position
            assert own.before(operations[-1])
        assert written[own.place] == own.position
