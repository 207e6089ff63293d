"""When a first token is late, and what a hedge may take of its budget."""

import pytest

from conclave.orchestrator.routing.budget import Budget
from conclave.orchestrator.routing.first_tokens import FEWEST, WINDOW, FirstTokens

WORKERS = ("a", "b", "c")


def seen(counts: dict[str, tuple[int, float]]) -> FirstTokens:
    times = FirstTokens()
    for worker, (count, seconds) in counts.items():
        for number in range(count):
            times.note(worker, seconds * (1 + number / 1000))
    return times


def test_a_slow_third_does_not_make_late_later() -> None:
    for answers in (0, 1, FEWEST, 20, WINDOW):
        times = seen({"a": (20, 0.05), "b": (20, 0.06), "c": (answers, 0.5)})
        usual = times.usual(WORKERS, 0.9)
        assert usual is not None and usual < 0.065


def test_a_worker_that_turns_slow_does_not_either() -> None:
    times = seen({"a": (WINDOW, 0.05), "b": (WINDOW, 0.05), "c": (WINDOW, 0.05)})
    for _ in range(2 * WINDOW):
        times.note("c", 0.5)
        usual = times.usual(WORKERS, 0.9)
        assert usual is not None and usual < 0.06


def test_it_follows_the_fleet_when_all_become_slower() -> None:
    times = seen(dict.fromkeys(WORKERS, (WINDOW, 0.05)))
    for name in WORKERS:
        for _ in range(WINDOW):
            times.note(name, 0.2)
    assert times.usual(WORKERS, 0.5) == times.usual(WORKERS, 0.99) == 0.2


@pytest.mark.parametrize(("fraction", "rank"), [(0.0, 0), (0.5, 50), (0.95, 95), (1.0, 99)])
def test_the_quantile_of_one(fraction: float, rank: int) -> None:
    times = FirstTokens()
    for number in reversed(range(100)):
        times.note("a", float(number))
    assert times.usual(["a"], fraction) == rank


def test_who_has_hardly_been_seen_says_nothing() -> None:
    times = seen({"a": (FEWEST - 1, 0.05)})
    assert times.usual(WORKERS, 0.9) is None
    assert times.usual((), 0.9) is None


def test_a_part_of_the_reserve_can_be_kept() -> None:
    budget = Budget(share=0.5, reserve=4.0)
    assert [budget.spend(keep=0.5) for _ in range(3)] == [True, True, False]
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(5):
        budget.earn()
    assert not budget.spend(keep=0.5)
    assert budget.spend()
