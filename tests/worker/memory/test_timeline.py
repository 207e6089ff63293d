"""Planned timelines obey the rules of streaming, and are traces that viewers read."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conclave.worker.memory.residency import Residency, choose
from conclave.worker.memory.timeline import Timeline, chrome_trace, play

SECONDS = st.floats(1e-5, 1e-2)
BLOCKS = st.lists(st.integers(1000, 2000), min_size=2, max_size=24)
TINY = 1e-9


def some_layers(blocks: list[int], share: float, ahead: int) -> Residency:
    """Of which at least a share is streamed, if that fits."""
    least = sum(blocks) * (1 - share) + 3 * max(blocks)
    return choose(blocks, int(least), ahead) or Residency(tuple(blocks))


def bounds(layers: list[float], head: float, residency: Residency, link: float) -> list[float]:
    return [head + sum(layers), residency.copied / link]


@given(BLOCKS, st.floats(0, 1), st.integers(0, 4), SECONDS, SECONDS, st.floats(1e4, 1e8))
def test_a_step_is_between_the_longer_part_and_both(
    blocks: list[int], share: float, ahead: int, each: float, head: float, link: float
) -> None:
    residency = some_layers(blocks, share, ahead)
    layers = [each] * len(blocks)
    parts = bounds(layers, head, residency, link)
    timeline = play(layers, head, residency, link, ahead > 0)
    assert max(parts) * (1 - 1e-6) <= timeline.seconds <= sum(parts) * (1 + 1e-6)
    assert timeline.seconds == pytest.approx(parts[0] + timeline.waited)
    if ahead == 0:
        assert timeline.seconds == pytest.approx(sum(parts))


@given(BLOCKS, st.floats(0, 1), st.integers(0, 4), SECONDS, st.floats(1e4, 1e8))
def test_nothing_is_overwritten_or_early(
    blocks: list[int], share: float, ahead: int, each: float, link: float
) -> None:
    residency = some_layers(blocks, share, ahead)
    timeline = play([each] * len(blocks), each, residency, link, ahead > 0)
    computed = timeline.of("compute")
    assert [span.layer for span in computed] == [*range(len(blocks)), None]
    for lane in ("compute", "copies", "waiting"):
        spans = timeline.of(lane)
        assert all(one.end <= other.start + TINY for one, other in pairwise(spans))
    copies = timeline.of("copies")
    for span in computed:
        if span.layer in residency.streamed:
            own = residency.streamed.index(span.layer) % residency.slots
            for copy in copies:
                assert copy.layer is not None
                same_slot = residency.streamed.index(copy.layer) % residency.slots == own
                if same_slot and copy.end > span.start + TINY:
                    assert copy.start >= span.end - TINY


def test_every_streamed_layer_is_copied_once_a_step() -> None:
    residency = Residency((100,) * 8, (0, 2, 4, 6), 2)
    timeline = play([1.0] * 8, 1.0, residency, 200.0, True)
    assert timeline.seconds == 9.0 and timeline.waited == 0
    inside = [span.layer for span in timeline.of("copies") if span.start >= 0]
    assert sorted(layer for layer in inside if layer is not None) == [0, 2, 4, 6]


def test_a_slow_link_is_never_idle() -> None:
    residency = Residency((100,) * 8, tuple(range(8)), 3)
    timeline = play([0.1] * 8, 0.1, residency, 100.0, True)
    assert timeline.seconds == pytest.approx(8.0) and timeline.waited == pytest.approx(7.1)


@given(BLOCKS, st.integers(0, 4), SECONDS, SECONDS, st.floats(1e4, 1e8))
def test_a_coded_layer_is_decoded_before_it_runs(
    blocks: list[int], ahead: int, each: float, decode: float, link: float
) -> None:
    residency = some_layers(blocks, 0.5, ahead)
    layers, decodes = [each] * len(blocks), [decode] * len(blocks)
    timeline = play(layers, each, residency, link, ahead > 0, decodes)
    busy = sum(layers) + each + sum(decodes)
    assert timeline.seconds == pytest.approx(busy + timeline.waited)
    assert timeline.seconds >= residency.copied / link * (1 - 1e-6)
    spans = sorted(
        (span for span in timeline.spans if span.lane != "copies"),
        key=lambda span: (span.start, span.end),
    )
    assert all(one.end <= other.start + TINY for one, other in pairwise(spans))
    assert [span.layer for span in timeline.of("decoding")] == [*range(len(blocks))]


def test_a_slot_is_free_as_its_layer_is_decoded() -> None:
    """One slot, two streamed layers: the next copy does not wait for the layer that runs."""
    residency = Residency((100,) * 4, (0, 2), 1)
    coded = play([1.0] * 4, 0.5, residency, 50.0, True, [0.5] * 4)
    assert (coded.seconds, coded.waited) == (6.5, 0.0)
    assert [span.start for span in coded.of("copies")] == [0.0, 3.0]
    plain = play([1.5] * 4, 0.5, residency, 50.0, True)
    assert (plain.seconds, plain.waited) == (7.0, 0.5)


def test_one_slot_of_coded_layers_keeps_a_slow_link_busy() -> None:
    residency = Residency((100,) * 8, tuple(range(8)), 1)
    timeline = play([0.1] * 8, 0.1, residency, 100.0, True, [0.2] * 8)
    assert timeline.seconds == pytest.approx(8.0) and timeline.waited == pytest.approx(5.5)
    demand = play([0.1] * 8, 0.1, residency, 100.0, False, [0.2] * 8)
    assert demand.seconds == pytest.approx(8.0 + 2.5)


def test_a_trace_has_a_process_for_each_timeline() -> None:
    residency = Residency((100,) * 4, (0, 2), 1)
    timelines: dict[str, Timeline] = {
        name: play([1.0] * 4, 0.5, residency, 50.0, prefetch)
        for name, prefetch in (("ahead", True), ("on demand", False))
    }
    events = chrome_trace(timelines)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "ahead", 1: "on demand"}
    demand = [e for e in events if e["pid"] == 1 and e["ph"] == "X"]
    waits = [e for e in demand if e["cat"] == "waiting"]
    assert [e["name"] for e in waits] == ["layer 0", "layer 2"]
    assert sum(e["dur"] for e in waits) == pytest.approx(4e6)
