"""A stream whose worker dies or hangs goes on elsewhere, behind its last token."""

import asyncio
import time
from typing import Any

import pytest

from conclave.orchestrator.routing.registry import WorkerState
from conclave.protos import gateway_pb2


def ids(events: list[Any]) -> list[int]:
    return [token.id for event in events for token in event.delta.tokens]


def same_weights(fleet: Any, weights: str = "same") -> None:
    for worker in fleet.workers:
        fleet.gateway.registry.workers[worker.name].weights = weights


def test_goes_on_behind_its_last_token(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            same_weights(fleet)
            fleet.workers[0].script = fleet.Scripts.count(die_at=3)
            fleet.workers[1].script = fleet.Scripts.count()
            events = await fleet.events(request_id="mine")
            assert ids(events) == list(range(6))
            assert {event.request_id for event in events} == {"mine"}
            finished = events[-1].finished
            assert (finished.resumes, finished.worker) == (1, "w1")
            assert finished.timings.total >= finished.timings.first_token > 0
            (first,), (second,) = fleet.workers[0].asked, fleet.workers[1].asked
            assert list(second.made[0].ids) == [0, 1, 2]
            assert second.sampling.seed == first.sampling.seed
            assert (await fleet.client.fleet()).resumes == 1

    run(scenario())


def test_goes_on_in_the_process_that_comes_after(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            fleet.workers[0].script = fleet.Scripts.count(die_at=2)
            stream = asyncio.ensure_future(fleet.events())
            await fleet.until(lambda: fleet.state(fleet.workers[0]) is WorkerState.DOWN)
            new = await fleet.replace(0)
            new.script = fleet.Scripts.count()
            events = await stream
            assert ids(events) == list(range(6)), events[-1]

    run(scenario())


@pytest.mark.parametrize("reason", ["weights", "handling"])
def test_is_refused_honestly(rig: Any, run: Any, reason: str) -> None:
    async def scenario() -> None:
        async with rig(2, wait_for_worker_seconds=0.2) as fleet:
            handling = {}
            if reason == "handling":
                same_weights(fleet)
                handling = {"handling": gateway_pb2.Handling(resume=False)}
            fleet.workers[0].script = fleet.Scripts.count(die_at=3)
            events = await fleet.events(**handling)
            assert ids(events) == [0, 1, 2]
            error = events[-1].failed.error
            assert error.code == 14
            assert reason == "handling" or "same weights" in error.message
            assert not fleet.workers[1].asked

    run(scenario())


def test_a_hung_worker_loses_its_streams_to_others_and_comes_back(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2, hang_seconds=0.3) as fleet:
            same_weights(fleet)
            await asyncio.sleep(0.1)  # its heartbeats have begun
            fleet.workers[0].script = fleet.Scripts.hang()
            fleet.workers[1].script = fleet.Scripts.count()
            stream = asyncio.ensure_future(fleet.events())
            await fleet.until(lambda: fleet.workers[0].running)
            started = time.monotonic()
            fleet.workers[0].silent = True
            assert ids(await stream) == list(range(6))
            assert time.monotonic() - started < 2.0
            assert "no heartbeat" in fleet.gateway.registry.workers["w0"].reason
            await fleet.until(lambda: not fleet.workers[0].running)  # its ask was taken back
            fleet.workers[0].silent = False
            await fleet.until(lambda: fleet.state(fleet.workers[0]) is WorkerState.SERVING)

    run(scenario())


def test_a_stuck_engine_counts_as_hung(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1, stuck_seconds=5.0) as fleet:
            fleet.workers[0].load.step_age_seconds = 6.0
            await fleet.until(lambda: fleet.state(fleet.workers[0]) is WorkerState.DOWN)
            fleet.workers[0].load.step_age_seconds = 0.0
            await fleet.until(lambda: fleet.state(fleet.workers[0]) is WorkerState.SERVING)

    run(scenario())


def test_the_budget_ends(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(4, retry_share=0.0, retry_reserve=2.0) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.fail_after(0)
            for _ in range(3):
                with pytest.raises(Exception, match="scripted"):
                    await fleet.client.generate("hello")
            assert sum(len(worker.asked) for worker in fleet.workers) == 3 + 2

    run(scenario())


def test_a_worker_that_always_fails_is_left_alone(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            fleet.workers[0].script = fleet.Scripts.fail_after(0)
            for _ in range(40):
                assert (await fleet.client.generate("hello")).worker == "w1"
            assert len(fleet.workers[0].asked) <= 7
            assert fleet.gateway.registry.workers["w0"].breaker.open

    run(scenario())


def test_bad_requests_do_not_trip_the_breaker(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            fleet.workers[0].script = fleet.Scripts.invalid("prompt")
            for _ in range(20):
                with pytest.raises(Exception, match="prompt"):
                    await fleet.client.generate("hello")
            assert not fleet.gateway.registry.workers["w0"].breaker.open

    run(scenario())
