"""How fast the gateway takes its workers to be."""

import pytest

from conclave.orchestrator.routing.pace import Pace
from conclave.orchestrator.routing.registry import FADING, SPEED_SHARE, Beat, Registry


def registry(**speeds: float) -> Registry:
    found = Registry()
    for name, speed in speeds.items():
        found.declare(name).speed = speed
    return found


def beats(*seen: tuple[int, int]) -> list[Beat]:
    """What follows from running sequences and tokens made, a second apart."""
    pace = Pace()
    return [
        pace.beat(now=10.0 + number, running=running, completed=made, outstanding=0, rate=0.0)
        for number, (running, made) in enumerate(seen)
    ]


def test_the_rate_of_one_stream() -> None:
    assert [beat.stream_speed for beat in beats((2, 0), (2, 100), (4, 250))] == [None, 50.0, 50.0]


def test_busy_without_a_token_is_not_idle() -> None:
    assert [beat.idle for beat in beats((0, 0), (0, 0), (1, 0), (1, 0))] == [
        True,
        True,
        False,
        False,
    ]


def test_only_an_idle_worker_fades() -> None:
    found = registry(slow=10.0, fast=90.0)
    found.beat("slow", Beat(0, 0.0, None, idle=False))
    assert found.workers["slow"].speed == 10.0
    found.beat("slow", Beat(0, 0.0, None, idle=True))
    assert found.workers["slow"].speed == pytest.approx(10 + FADING * 40)


def test_who_was_outrun_is_slower() -> None:
    found = registry(slow=100.0, fast=100.0)
    found.outrun("slow", "fast", 0.2)
    assert found.workers["slow"].speed == pytest.approx(100 - SPEED_SHARE * 80)
    for _ in range(100):
        found.outrun("slow", "fast", 0.2)
    assert found.workers["slow"].speed == pytest.approx(20)
    assert found.workers["fast"].speed == 100


def test_being_outrun_makes_nobody_faster_and_strangers_do_not_count() -> None:
    found = registry(slow=10.0, fast=100.0)
    found.outrun("slow", "fast", 0.2)
    found.outrun("slow", "gone", 0.1)
    found.outrun("gone", "fast", 0.1)
    assert found.workers["slow"].speed == 10
