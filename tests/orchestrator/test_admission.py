"""The queue in front of the fleet: order, bounds, deadlines, and that every place is given back."""

import asyncio
from typing import Any

import pytest

from conclave.orchestrator.config import GatewayConfig
from conclave.orchestrator.gateway.admission import Admission, Ask
from conclave.orchestrator.routing.registry import About, Registry, Worker, WorkerState
from conclave.orchestrator.routing.router import Selector, Wish, WorkerNotFound
from conclave.worker import Knobs
from conclave.worker.errors import DeadlineExceeded, Overloaded, Unavailable
from conclave.worker.precision import Precision


def fleet(room: int = 1, **settings: Any) -> tuple[Registry, Worker, Admission]:
    registry = Registry()
    worker = registry.declare("a")
    worker.state, worker.max_sequences = WorkerState.SERVING, room
    return registry, worker, Admission(registry, GatewayConfig(**settings))


def ask(seconds: float | None = None, **fields: Any) -> Ask:
    return Ask(Wish(tokens=10), lambda: seconds, answer_tokens=8, **fields)


async def fill(admission: Admission, worker: Worker) -> list[Ask]:
    taken = []
    while worker.has_room:
        taken.append(ask())
        await admission.place(taken[-1])
    return taken


def test_places_are_given_in_order_of_priority_and_given_back() -> None:
    async def scenario() -> None:
        _, worker, admission = fleet()
        taken = await fill(admission, worker)
        order: list[str] = []

        async def wait(name: str, priority: int) -> None:
            mine = ask(priority=priority)
            await admission.place(mine)
            order.append(name)
            await asyncio.sleep(0)
            admission.release(mine, worker)

        tasks = []
        for name, priority in (("first", 4), ("second", 4), ("urgent", 9), ("idle", 0)):
            tasks.append(asyncio.create_task(wait(name, priority)))
            await asyncio.sleep(0)
        assert admission.queued == 4
        for each in taken:
            admission.release(each, worker)
        await asyncio.gather(*tasks)
        assert order == ["urgent", "first", "second", "idle"]
        assert (worker.open_requests, worker.open_sequences, worker.open_tokens) == (0, 0, 0)

    asyncio.run(scenario())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def scenario() -> None:
        _, worker, admission = fleet(max_queued_requests=1)
        await fill(admission, worker)
        worker.tokens_per_second = 4.0
        waiting = asyncio.create_task(admission.place(ask()))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await admission.place(ask())
        assert refused.value.retry_after == 2.0
        urgent = asyncio.create_task(admission.place(ask(priority=5)))
        with pytest.raises(Overloaded, match="higher priority"):
            await waiting
        assert (admission.queued, admission.rejections) == (1, 2)
        urgent.cancel()

    asyncio.run(scenario())


def test_tokens_bound_the_queue_too() -> None:
    async def scenario() -> None:
        _, worker, admission = fleet(max_queued_tokens=15)
        await fill(admission, worker)
        tasks = [asyncio.create_task(admission.place(ask())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await admission.place(ask())
        for task in tasks:
            task.cancel()

    asyncio.run(scenario())


def test_what_would_come_too_late_is_refused_at_once() -> None:
    async def scenario() -> None:
        _, worker, admission = fleet()
        await fill(admission, worker)
        worker.tokens_per_second = 1.0
        waiting = asyncio.create_task(admission.place(ask()))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="too late for its deadline"):
            await admission.place(ask(seconds=5.0))
        patient = asyncio.create_task(admission.place(ask(seconds=60.0)))
        await asyncio.sleep(0)
        assert admission.queued == 2
        waiting.cancel()
        patient.cancel()

    asyncio.run(scenario())


def test_a_deadline_passes_in_the_queue() -> None:
    async def scenario() -> None:
        _, worker, admission = fleet()
        await fill(admission, worker)
        end = asyncio.get_running_loop().time() + 0.05
        mine = Ask(Wish(), lambda: end - asyncio.get_running_loop().time())
        with pytest.raises(DeadlineExceeded):
            await admission.place(mine)
        assert admission.queued == 0

    asyncio.run(scenario())


def test_a_cancel_gives_back_a_place_that_had_just_been_given() -> None:
    async def scenario() -> None:
        _, worker, admission = fleet()
        taken = await fill(admission, worker)
        waiting = asyncio.create_task(admission.place(ask()))
        await asyncio.sleep(0)
        before = worker.open_sequences
        admission.release(taken[0], worker)  # gives the place to the waiting one
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert worker.open_sequences == before - 1

    asyncio.run(scenario())


def test_another_selector_does_not_wait_behind_the_queue() -> None:
    async def scenario() -> None:
        registry, worker, admission = fleet()
        other = registry.declare("b")
        other.state, other.max_sequences = WorkerState.SERVING, 1
        while worker.has_room:
            await admission.place(Ask(Wish(Selector(frozenset("a"))), lambda: None))
        waiting = asyncio.create_task(
            admission.place(Ask(Wish(Selector(frozenset("a"))), lambda: None))
        )
        await asyncio.sleep(0)
        assert await admission.place(Ask(Wish(Selector(frozenset("b"))), lambda: None)) is other
        waiting.cancel()

    asyncio.run(scenario())


def test_who_turns_out_not_to_fit_is_no_reason_to_wait_on() -> None:
    async def scenario() -> None:
        registry, worker, admission = fleet()
        worker.state = WorkerState.STARTING
        selector = Selector(knobs=Knobs(weight_bits=8))
        asks = [Ask(Wish(selector), lambda: None), ask()]
        waiting = [asyncio.create_task(admission.place(each)) for each in asks]
        await asyncio.sleep(0)
        about = About("m", "cpu", {}, max_sequences=1, precision=Precision(0.5, 4, 2.3))
        registry.described("a", about)
        registry.serving("a")
        admission.changed()
        with pytest.raises(WorkerNotFound, match=r"a: 4-bit values, 50.0% pruned"):
            await waiting[0]
        assert await waiting[1] is worker

    asyncio.run(scenario())


def test_nobody_serves() -> None:
    async def scenario() -> None:
        registry, worker, admission = fleet(wait_for_worker_seconds=0.05)
        worker.state = WorkerState.STARTING
        with pytest.raises(Unavailable, match="a starting"):
            await admission.place(ask())
        registry.down("a", "it died", lost=True)
        with pytest.raises(Unavailable, match="it died"):
            await admission.place(ask())

    asyncio.run(scenario())
