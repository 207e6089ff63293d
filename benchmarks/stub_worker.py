"""A scripted worker in a process of its own: all of WorkerService, no model, no torch, no Ray.

    python -m benchmarks.stub_worker --name a --rate 2000 --slots 32

Prints one JSON line with its address when it serves, then obeys JSON lines on its input, each
answered by one on its output, and ends when its input does:

    {"slowdown": 10}        any field of Settings takes a new value
    {"fail": "a message"}   every running request fails, as when a step raises or makes NaN
    {"refuse": 0.5}         new asks get RESOURCE_EXHAUSTED with this RetryInfo; null ends it
    {"stall": true}         the engine stands still while the process goes on; false ends it
    {"block": 3.0}          the whole process hangs for so many seconds
    {"drain": 1.0}          drains itself with so many seconds of grace
    {"steps": true}         answers with the seconds that each Step since the last asking took
"""

import argparse
import asyncio
import contextlib
import json
import math
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import fields
from typing import Any

import grpc
import grpc.aio
import uvloop
from google.rpc import code_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from conclave.protos import generation_pb2 as pb
from conclave.protos import worker_pb2, worker_pb2_grpc
from conclave.worker.address import local_name

from .stub_clock import Clock
from .stub_machine import (
    MAX_CONTEXT,
    MAX_OUTPUTS,
    VOCABULARY,
    Job,
    Machine,
    Refusal,
    Settings,
    Told,
)
from .stub_replies import Gathered, Stepper, abort, scores
from .stub_talk import Talk

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
MESSAGE_MIB = 64


class StubWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One scripted worker; `run` keeps its machine going."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.machine = Machine(settings)
        self.incarnation = secrets.token_hex(8)
        self.refuse: float | None = None
        self.stalled = False
        self.draining = False
        self._last_step = time.monotonic()
        self._step_times: list[float] = []
        self._wake = asyncio.Event()
        self._talks: set[Talk] = set()
        self.health = health.aio.HealthServicer()  # type: ignore[attr-defined]

    async def run(self) -> None:
        """Steps for ever, on time."""
        clock = Clock()
        while True:
            if self.machine.idle or self.stalled:
                self._wake.clear()
                await self._wake.wait()
                clock.begin()
                if not self.stalled:
                    self._last_step = time.monotonic()
                continue
            await clock.step(self.machine.step_seconds)
            if not self.stalled:
                self._last_step = time.monotonic()
                self.machine.step(self._last_step)
                self.flush()

    def submit(
        self, request: pb.GenerateRequest, sink: Callable[[Told], None], timeout: float | None
    ) -> Job:
        """Queues a request. Raises Refusal."""
        self.check_open()
        job = self.machine.submit(request, sink, time.monotonic(), timeout)
        self._wake.set()
        return job

    def check_open(self) -> None:
        """Raises Refusal while nothing is taken."""
        if self.draining:
            raise Refusal(code_pb2.UNAVAILABLE, "the worker is draining")
        if self.refuse is not None:
            full = "told to refuse"
            raise Refusal(code_pb2.RESOURCE_EXHAUSTED, full, retry_after=self.refuse)

    def flush(self) -> None:
        """Lets every conversation write what has gathered."""
        for talk in self._talks:
            talk.flush()

    def load(self) -> worker_pb2.GetLoadResponse:
        """How busy it is."""
        return self.machine.load(time.monotonic(), self._last_step, self.draining)

    async def set_serving(self, serving: bool) -> None:
        """Says so to everyone who watches its health."""
        answer = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self.health.set(name, answer.SERVING if serving else answer.NOT_SERVING)

    async def drain(self, grace: float | None) -> worker_pb2.DrainResponse:
        """Refuses new asks and waits for the running ones."""
        self.draining = True
        await self.set_serving(False)
        open_jobs = len(self.machine.running) + len(self.machine.queue)
        ends = time.monotonic() + (math.inf if grace is None else grace)
        while not self.machine.idle and time.monotonic() < ends:
            await asyncio.sleep(0.02)
        left = len(self.machine.running) + len(self.machine.queue)
        self.machine.running += self.machine.queue
        self.machine.queue.clear()
        self.machine.fail("the worker is draining")
        self.flush()
        return worker_pb2.DrainResponse(completed=open_jobs - left, aborted=left)

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Does what a control line says (see the module's docstring), and how many it has hit."""
        answer: dict[str, Any] = {"done": sorted(command), "hit": len(self.machine.running)}
        for name, value in command.items():
            if name == "fail":
                self.machine.fail(value)
                self.flush()
            elif name == "refuse":
                self.refuse = value
            elif name == "stall":
                self.stalled = value
                self._wake.set()
            elif name == "block":
                time.sleep(value)
            elif name == "drain":
                await self.drain(value)
            elif name == "steps":
                answer["steps"], self._step_times = self._step_times, []
            else:
                setattr(self.settings, name, type(getattr(self.settings, name))(value))
        return answer

    # -- rpcs ----------------------------------------------------------------------------------

    async def Describe(self, request: Any, context: Any) -> worker_pb2.DescribeResponse:
        settings = self.settings
        return worker_pb2.DescribeResponse(
            worker=settings.name,
            model=settings.model,
            labels=settings.labels,
            incarnation=self.incarnation,
            conclave_version="stub",
            device="stub",
            vocab_size=VOCABULARY,
            max_context=MAX_CONTEXT,
            max_sequences=settings.slots,
            max_outputs=MAX_OUTPUTS,
            max_logprobs=VOCABULARY,
            model_fingerprint=settings.weights,
            tokenizer_fingerprint=settings.tokenizer,
        )

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        async for told in self._answer(request, context):
            if isinstance(told, Refusal):
                await abort(context, told)
            yield told

    async def Complete(self, request: pb.GenerateRequest, context: Any) -> pb.CompleteResponse:
        gathered = Gathered()
        request.whole = True
        async for told in self._answer(request, context):
            if isinstance(told, Refusal):
                await abort(context, told)
            gathered.take(told)
        return gathered.response

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        try:
            self.check_open()
            return scores(request, self.settings)
        except Refusal as refusal:
            await abort(context, refusal)

    async def Converse(self, requests: Any, context: Any) -> None:
        talk = Talk(self, context)
        self._talks.add(talk)
        try:
            await talk.run()
        finally:
            self._talks.discard(talk)

    async def Step(self, requests: Any, context: Any) -> None:
        stepper: Stepper | None = None
        with closing(Clock()) as clock:
            while (request := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                clock.begin()
                if stepper is None:
                    stepper = Stepper(request.open, self.settings)
                    response = stepper.opened()
                else:
                    response = stepper.take(list(request.take.ids), request.take.generate)
                self._step_times.append(await clock.step(self.machine.step_seconds))
                await context.write(response)

    async def GetLoad(self, request: Any, context: Any) -> worker_pb2.GetLoadResponse:
        return self.load()

    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: Any
    ) -> AsyncIterator[worker_pb2.GetLoadResponse]:
        pause = request.interval_seconds if request.HasField("interval_seconds") else 0.5
        while True:
            yield self.load()
            await asyncio.sleep(max(0.05, pause))

    async def Drain(self, request: Any, context: Any) -> worker_pb2.DrainResponse:
        return await self.drain(
            request.grace_seconds if request.HasField("grace_seconds") else None
        )

    async def _answer(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[Told]:
        arrived: asyncio.Queue[Told] = asyncio.Queue()
        try:
            job = self.submit(request, arrived.put_nowait, context.time_remaining())
        except Refusal as refusal:
            yield refusal
            return
        try:
            ended = False
            while not ended:
                told = await arrived.get()
                ended = isinstance(told, Refusal) or told.WhichOneof("event") != "delta"
                yield told
        finally:
            self.machine.abort(job)


async def serve(settings: Settings, host: str, port: int) -> None:
    """Serves until the process's input ends."""
    worker = StubWorker(settings)
    size = MESSAGE_MIB * 2**20
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ]
    )
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
    health_pb2_grpc.add_HealthServicer_to_server(worker.health, server)
    await worker.set_serving(True)
    address = f"{host}:{server.add_insecure_port(f'{host}:{port}')}"
    server.add_insecure_port(f"unix-abstract:{local_name(address)}")  # as a real worker does
    await server.start()
    running = asyncio.create_task(worker.run(), name="machine")
    print(json.dumps({"address": address, "incarnation": worker.incarnation}), flush=True)
    async for line in input_lines():
        print(json.dumps(await worker.obey(json.loads(line))), flush=True)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await server.stop(0.0)


async def input_lines() -> AsyncIterator[bytes]:
    """The lines of this process's input, until it is closed."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    while line := await reader.readline():
        yield line


def parse() -> argparse.Namespace:
    """The command line: an address, and every field of Settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    for each in fields(Settings):
        option = f"--{each.name.replace('_', '-')}"
        if each.name == "labels":
            parser.add_argument(option, type=json.loads, default={}, help="a JSON object")
        else:
            parser.add_argument(option, type=type(each.default), default=each.default)
    return parser.parse_args()


def main() -> None:
    """Run one stub worker."""
    options = vars(parse())
    host, port = options.pop("host"), options.pop("port")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Settings(**options), host, port))


if __name__ == "__main__":
    main()
