"""How large a group becomes, from lists of measurements."""

import pytest

from conclave.orchestrator.fleet.plan import Phase
from conclave.orchestrator.fleet.scaling import (
    Bounds,
    GroupLoad,
    Peaks,
    chosen,
    need,
    resize,
    size,
)

BOUNDS = Bounds(smallest=0, largest=4, target_load=0.5, calm_seconds=10.0)
CAPACITY = 8
START: Peaks = ((float("-inf"), 0),)


def load(open_sequences: int, waiting: int = 0, serving: int = 1) -> GroupLoad:
    return GroupLoad(serving, open_sequences, waiting, CAPACITY)


@pytest.mark.parametrize(
    ("open_sequences", "waiting", "serving", "wanted"),
    [
        (0, 0, 0, 0),
        (0, 1, 0, 1),  # from zero, as soon as an ask waits
        (0, 9, 0, 3),
        (4, 0, 1, 1),  # exactly at the target
        (5, 0, 1, 2),
        (8, 3, 1, 3),  # full: what waits counts
        (7, 99, 1, 2),  # it has room: they wait for another group
        (100, 100, 4, 4),
    ],
)
def test_need(open_sequences: int, waiting: int, serving: int, wanted: int) -> None:
    assert need(load(open_sequences, waiting, serving), BOUNDS) == wanted


def test_never_below_or_above_the_bounds() -> None:
    fixed = Bounds(smallest=2, largest=2, target_load=0.5, calm_seconds=0.0)
    assert need(load(0), fixed) == need(load(1000), fixed) == 2
    assert size(((0.0, 9),), fixed) == size(((0.0, 0),), fixed) == 2


def sizes(loads: list[int], seconds: float = 1.0) -> list[int]:
    """The size after each of these open sequences, so many seconds apart."""
    peaks, found = START, []
    for step, open_sequences in enumerate(loads):
        peaks = resize(peaks, load(open_sequences, serving=4), BOUNDS, step * seconds)
        assert [n for _, n in peaks] == sorted({n for _, n in peaks}, reverse=True)
        found.append(size(peaks, BOUNDS))
    return found


def test_up_at_once_and_down_after_calm() -> None:
    assert sizes([0, 1, 16, 1, 1, 1, 1], seconds=4.0) == [0, 1, 4, 4, 4, 1, 1]


def test_a_flapping_load_moves_nothing() -> None:
    assert sizes([16, 0] * 20, seconds=4.0) == [4] * 40


def test_down_in_steps_to_what_was_needed_since() -> None:
    assert sizes([16, 12, 8, 4, 0, 0, 0, 0, 0], seconds=5.0) == [4, 4, 3, 2, 1, 0, 0, 0, 0]


def test_a_short_peak_in_calm_counts_again() -> None:
    assert sizes([16, 1, 1, 16, 1, 1, 1], seconds=5.0) == [4, 4, 1, 4, 4, 1, 1]


def test_those_that_serve_are_kept_then_the_lower_numbers() -> None:
    names = ["w-0", "w-1", "w-2", "w-3"]
    assert chosen(names, {}, 2) == ["w-0", "w-1"]
    assert chosen(names, dict.fromkeys(names, Phase.READY), 2) == ["w-0", "w-1"]
    phases = {"w-0": Phase.STARTING, "w-2": Phase.READY, "w-3": Phase.READY}
    assert chosen(names, phases, 2) == ["w-2", "w-3"]
    assert chosen(names, phases, 3) == ["w-0", "w-2", "w-3"]
    assert chosen(names, {"w-0": Phase.DRAINING}, 1) == ["w-1"]
    assert chosen(names, {"w-0": Phase.FAILED}, 1) == ["w-0"], "the next would fail as well"
    assert chosen(names, {}, 0) == []
