"""A worker that is replaced or leaves ends what it has begun; nobody notices."""

import asyncio
from typing import Any

import pytest

from conclave.orchestrator.client import Unavailable

from .conftest import FakeWorker, Scripts


def run(work: Any) -> None:
    asyncio.run(work)


def test_streams_go_on_with_the_old_process_while_the_new_one_serves(rig: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            (old,) = fleet.workers
            old.script = Scripts.answer(20, pause=0.02)
            stream = asyncio.ensure_future(fleet.events(request_id="long"))
            await fleet.until(lambda: old.running == 1)
            new: FakeWorker = await fleet.replace(0)
            answer = await fleet.client.generate("hi")
            assert answer.text == "t0 t1 t2 " and len(new.asked) == 1
            assert old.running == 1, "the stream was cut"
            await old.set_serving(False)
            events = await stream
            assert [event.WhichOneof("event") for event in events] == ["delta"] * 20 + ["finished"]
            assert (await fleet.client.generate("hi")).worker == "w0"
            assert len(old.asked) == 1 and not old.cancelled
            await fleet.until(lambda: not fleet.gateway._closing)

    run(scenario())


def test_a_retired_worker_ends_its_streams_and_asks_wait_for_the_next(rig: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            (old,) = fleet.workers
            old.script = Scripts.answer(20, pause=0.02)
            stream = asyncio.ensure_future(fleet.events(request_id="long"))
            await fleet.until(lambda: old.running == 1)
            fleet.gateway.retire("w0", "drains before it ends")
            waiting = asyncio.ensure_future(fleet.client.generate("hi"))
            await fleet.until(lambda: fleet.gateway.queued == 1)
            assert (await stream)[-1].WhichOneof("event") == "finished"
            new = await fleet.replace(0)
            assert (await waiting).text == "t0 t1 t2 " and len(new.asked) == 1

    run(scenario())


def test_a_forgotten_worker_ends_its_streams(rig: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            for worker in fleet.workers:
                worker.script = Scripts.answer(10, pause=0.02)
            stream = asyncio.ensure_future(fleet.events(request_id="long"))
            await fleet.until(lambda: any(worker.running for worker in fleet.workers))
            busy = next(worker for worker in fleet.workers if worker.running)
            fleet.gateway.forget(busy.name)
            assert [worker.name for worker in await fleet.client.workers()] != [busy.name]
            assert (await stream)[-1].WhichOneof("event") == "finished"
            assert not busy.cancelled

    run(scenario())


def test_a_lost_worker_is_not_waited_for(rig: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            fleet.gateway.retire("w0", "drains before it ends")
            fleet.gateway.lost("w0", "bad checkpoint")
            with pytest.raises(Unavailable, match="bad checkpoint"):
                await fleet.client.generate("hi")

    run(scenario())
