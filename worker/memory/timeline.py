"""What computes, copies and waits when in one step: the rules of `streaming`, played through.

A step of the steady state, in which the copies for its first layers ran during the step before.
Copies follow each other on the link in the order in which slots become free. What it gave up: that
copies and kernels share the device's memory; time between two kernels; that a coded layer comes and
is decoded in parts. Here a whole layer is decoded before it runs, and the next one's copy begins
with that; really each part is free when its module is decoded, the last one shortly before the
layer has run, and is needed as much later in the next one.

`chrome_trace` is the Trace Event Format, which Perfetto and chrome://tracing show.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .residency import Residency

Lane = Literal["compute", "decoding", "copies", "waiting"]
_LANES: tuple[Lane, ...] = ("compute", "decoding", "waiting", "copies")
_STEPS = 8
"""Played through; the last one is told. After a few nothing changes."""


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that one lane does."""

    lane: Lane
    layer: int | None
    """None: the head."""
    start: float
    """Seconds from the beginning of the step; a copy of the step before began earlier, below 0."""
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Timeline:
    """One planned step, or all that were recorded."""

    seconds: float
    spans: tuple[Span, ...]
    """Computing, decoding and waiting, and the copies that were on the link meanwhile."""

    def of(self, lane: Lane) -> list[Span]:
        """In order."""
        return [span for span in self.spans if span.lane == lane]

    @property
    def waited(self) -> float:
        """Seconds in which nothing was computed."""
        return sum(span.seconds for span in self.of("waiting"))


def play(
    layers: Sequence[float],
    head: float,
    residency: Residency,
    link: float,
    prefetch: bool,
    decoding: Sequence[float] = (),
) -> Timeline:
    """Play steps through until they repeat.

    Args:
        layers: seconds that each layer computes, its weights at hand.
        head: seconds of the head, after them.
        residency: which layers are streamed, through which slots.
        link: bytes a second.
        prefetch: whether copies begin when a slot is free; else each when its layer begins.
        decoding: seconds that each layer is decoded before it runs, if layers are coded. Then the
            next copy into its slot may begin when that does: parts follow each other.
    """
    positions = {layer: position for position, layer in enumerate(residency.streamed)}
    copies = [residency.blocks[layer] / link for layer in residency.streamed]
    spans: list[Span] = []
    ready: dict[int, float] = {}
    now = begun = on_link = 0.0

    def copy(position: int, free: float) -> None:
        nonlocal on_link
        start = max(on_link, free)
        spans.append(Span("copies", residency.streamed[position], start, copies[position]))
        on_link = ready[position] = start + copies[position]

    if prefetch:
        for first in range(residency.slots):
            copy(first, 0.0)
    for _ in range(_STEPS):
        begun = now
        for layer, seconds in enumerate(layers):
            position = positions.get(layer)
            if position is not None:
                if not prefetch:
                    copy(position, now)
                if ready[position] > now:
                    spans.append(Span("waiting", layer, now, ready[position] - now))
                    now = ready[position]
            begins = now
            if decoding:
                spans.append(Span("decoding", layer, now, decoding[layer]))
                now += decoding[layer]
            spans.append(Span("compute", layer, now, seconds))
            now += seconds
            if position is not None and prefetch:
                copy(residency.next(position), begins if decoding else now)
        spans.append(Span("compute", None, now, head))
        now += head
    return Timeline(now - begun, tuple(_between(spans, begun, now)))


def _between(spans: Sequence[Span], begun: float, end: float) -> Iterator[Span]:
    """What was done from `begun` to `end`, told from `begun` on."""
    for span in spans:
        if span.end > begun and span.start < end:
            yield Span(span.lane, span.layer, span.start - begun, span.seconds)


def chrome_trace(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """Timelines by name, each as a process with a thread for each lane; microseconds."""
    events: list[dict[str, Any]] = []
    for process, (name, timeline) in enumerate(timelines.items()):
        events.append(_named("process_name", name, process, 0))
        for thread, lane in enumerate(_LANES):
            events.append(_named("thread_name", lane, process, thread))
            for span in timeline.of(lane):
                what = "head" if span.layer is None else f"layer {span.layer}"
                events.append(
                    {
                        **{"name": what, "cat": lane, "ph": "X", "pid": process, "tid": thread},
                        **{"ts": span.start * 1e6, "dur": span.seconds * 1e6},
                    }
                )
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _named(what: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
