"""Rings that wait for their turn, and may be void by then."""

import asyncio
from typing import Any

from conclave.orchestrator.ensemble.calls import Alarm
from conclave.orchestrator.gateway.alarms import Alarms, Ring


async def rung(*names: str) -> tuple[Alarms, list[Ring]]:
    """Alarms of these names that have rung, in that order."""
    rings: list[Ring] = []
    alarms = Alarms(rings.append)
    for name in names:
        alarms.arm(Alarm(0.0, name))
    while len(rings) < len(names):
        await asyncio.sleep(0)
    return alarms, rings


def test_a_ring_counts_once(run: Any) -> None:
    async def scenario() -> None:
        alarms, (ring,) = await rung("late")
        assert ring.alarm == Alarm(0.0, "late")
        assert alarms.take(ring)
        assert not alarms.take(ring)

    run(scenario())


def test_a_ring_is_void_after_a_disarm(run: Any) -> None:
    async def scenario() -> None:
        alarms, (first, second) = await rung("first", "second")
        alarms.disarm("first")
        assert not alarms.take(first)
        assert alarms.take(second)

    run(scenario())


def test_a_ring_is_void_after_a_new_alarm_of_its_name(run: Any) -> None:
    async def scenario() -> None:
        alarms, (ring,) = await rung("")
        alarms.arm(Alarm(0.0))
        assert not alarms.take(ring)

    run(scenario())


def test_stopped_alarms_are_silent(run: Any) -> None:
    async def scenario() -> None:
        rings: list[Ring] = []
        alarms = Alarms(rings.append)
        alarms.arm(Alarm(0.0, "one"))
        alarms.arm(Alarm(0.0, "other"))
        alarms.stop()
        await asyncio.sleep(0.01)
        assert not rings

    run(scenario())
