"""A served fleet: it answers, drains, and survives the death of a worker under load."""

import asyncio
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from conclave.orchestrator.client import (
    AsyncClient,
    Client,
    Select,
    Unavailable,
    WorkerState,
    WorkerStatus,
)
from conclave.orchestrator.security.channels import WithMetadata, fleet_metadata
from conclave.protos import worker_pb2, worker_pb2_grpc

from .traffic import counters

PROMPT = "Package: vim\nLanguage: en\n\n"
STREAMS = 32


def status(client: Client, name: str) -> WorkerStatus:
    (found,) = client.workers(Select(names=[name]))
    return found


def test_answers_through_gateway_and_actor(client: Client) -> None:
    whole = client.generate(PROMPT, max_tokens=16, temperature=0.0, ignore_eos=True)
    assert whole.usage.completion_tokens == 16
    assert whole.worker in {"w-0", "w-1"}
    stream = client.stream(PROMPT, max_tokens=16, temperature=0.0, ignore_eos=True)
    assert "".join(delta.text for delta in stream) == whole.text
    assert stream.completion.outputs == whole.outputs


def test_scores(client: Client) -> None:
    (score,) = client.score(PROMPT, ["a text editor"])
    assert score.logprob < 0 and score.scored_tokens > 0


@dataclass
class Load:
    """One of many streams, and how it ended."""

    deltas: int = 0
    error: Exception | None = None
    worker: str = ""
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, client: AsyncClient, tokens: int) -> None:
        stream = client.stream(PROMPT, max_tokens=tokens, ignore_eos=True, seed=1)
        try:
            async for _ in stream:
                self.deltas += 1
                self.begun.set()
            self.worker = stream.completion.worker
        except Unavailable as error:
            self.error = error


def test_kill_under_load(client: Client, ground: Any) -> None:
    victim = status(client, "w-0")
    before = counters(client.address)

    async def scenario() -> list[Load]:
        async with AsyncClient(client.address, timeout=120.0) as caller:
            loads = [Load() for _ in range(STREAMS)]
            tasks = [asyncio.ensure_future(load.run(caller, 100)) for load in loads]
            # Eight sequences a worker run at once, so sixteen streams still wait for a place.
            while sum(load.begun.is_set() for load in loads) < 12:
                await asyncio.sleep(0.01)
            assert sum(not load.begun.is_set() for load in loads) >= 8
            os.kill(victim.process, signal.SIGKILL)
            await asyncio.wait(tasks)
            for task in tasks:
                task.result()
            return loads

    loads = asyncio.run(scenario())
    # What had begun went on with the other worker, what had not was asked there anew.
    assert not [load.error for load in loads if load.error is not None]
    assert counters(client.address).resumes > before.resumes
    assert all(load.worker for load in loads)
    # No later ask sees the dead process, and the worker comes back without a hand.
    while status(client, "w-0").restarts == victim.restarts:
        assert client.generate(PROMPT, max_tokens=1).worker
    ground.serving(client, 2, "serve.log")
    after = status(client, "w-0")
    assert after.process != victim.process and after.incarnation != victim.incarnation
    select = Select(names=["w-0"])
    assert client.generate(PROMPT, max_tokens=4, select=select).worker == "w-0"


def test_an_ask_for_a_dead_worker_waits_for_it(client: Client, ground: Any) -> None:
    ground.serving(client, 2, "serve.log")
    os.kill(status(client, "w-1").process, signal.SIGKILL)
    started = time.monotonic()
    try:
        answer = client.generate(PROMPT, max_tokens=4, select=Select(names=["w-1"]))
        assert answer.worker == "w-1"
    except Unavailable:
        # A slow machine may need longer than the gateway lets an ask wait.
        assert time.monotonic() - started >= 9.0
    ground.serving(client, 2, "serve.log")


def test_a_drained_worker_gets_no_asks(client: Client, ground: Any) -> None:
    ground.serving(client, 2, "serve.log")
    drained = status(client, "w-1")
    with grpc.insecure_channel(drained.address) as channel:
        stranger = worker_pb2_grpc.WorkerServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="its own fleet"):
            stranger.Drain(worker_pb2.DrainRequest(), timeout=10.0)
        line: Any = WithMetadata(channel, fleet_metadata(ground.secret))
        stub = worker_pb2_grpc.WorkerServiceStub(line)
        stub.Drain(worker_pb2.DrainRequest(grace_seconds=1.0), timeout=10.0)
    ground.until(lambda: status(client, "w-1").state is WorkerState.DRAINING, seconds=5.0)
    for _ in range(3):
        assert client.generate(PROMPT, max_tokens=2).worker == "w-0"
    with pytest.raises(Unavailable, match="w-1 draining"):
        client.generate(PROMPT, max_tokens=2, select=Select(names=["w-1"]))
    os.kill(drained.process, signal.SIGKILL)
    ground.serving(client, 2, "serve.log")
