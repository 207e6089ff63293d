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
from typing import Any, NoReturn

import grpc
import grpc.aio
import uvloop
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from conclave.protos import generation_pb2 as pb
from conclave.protos import worker_pb2, worker_pb2_grpc
from conclave.worker.address import local_name

from .exact_sleep import ExactSleep
from .stub_machine import (
    MAX_CONTEXT,
    MAX_OUTPUTS,
    VOCABULARY,
    Job,
    Machine,
    Refusal,
    Sequence,
    Settings,
    Told,
)

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
DETAILS_KEY = "grpc-status-details-bin"
MESSAGE_MIB = 64
LATE_SECONDS = 0.1
"""A stub this late gives up catching up with its own schedule."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Clock:
    """When the steps of a simulated machine end.

    The loop's sleep ends late, by a millisecond and more on a busy machine, which no real step
    does: what one step has taken too long is deducted from the next one. The same for all that is
    stepped, by the worker itself or from outside.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._late = 0.0
        self._sleep = ExactSleep()

    def begin(self) -> None:
        """A step begins now, and not with the end of the last one."""
        self._began = time.monotonic()

    def close(self) -> None:
        """Give the timer back."""
        self._sleep.close()

    async def step(self, seconds: float) -> float:
        """Until the end of the present step, with which the next one begins; returns what it took
        in truth."""
        due = self._began + seconds - self._late
        await self._sleep.until(due)
        began, self._began = self._began, time.monotonic()
        self._late = min(self._began - due, LATE_SECONDS)
        return self._began - began


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
        self._talks: set[_Talk] = set()
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
                await _abort(context, told)
            yield told

    async def Complete(self, request: pb.GenerateRequest, context: Any) -> pb.CompleteResponse:
        gathered = _Gathered()
        request.whole = True
        async for told in self._answer(request, context):
            if isinstance(told, Refusal):
                await _abort(context, told)
            gathered.take(told)
        return gathered.response

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        try:
            self.check_open()
            return scores(request, self.settings)
        except Refusal as refusal:
            await _abort(context, refusal)

    async def Converse(self, requests: Any, context: Any) -> None:
        talk = _Talk(self, context)
        self._talks.add(talk)
        try:
            await talk.run()
        finally:
            self._talks.discard(talk)

    async def Step(self, requests: Any, context: Any) -> None:
        stepper: _Stepper | None = None
        with closing(Clock()) as clock:
            while (request := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                clock.begin()
                if stepper is None:
                    stepper = _Stepper(request.open, self.settings)
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


class _Gathered:
    """Makes one answer of a request's events."""

    def __init__(self) -> None:
        self.response = pb.CompleteResponse()
        self._tokens: dict[int, list[pb.Token]] = {}

    def take(self, event: pb.GenerateResponse) -> None:
        """One more event."""
        if event.HasField("delta"):
            self._tokens.setdefault(event.delta.output_index, []).extend(event.delta.tokens)
            return
        finished, response = event.finished, self.response
        response.request_id = event.request_id
        response.usage.CopyFrom(finished.usage)
        response.timings.CopyFrom(finished.timings)
        response.worker, response.model = finished.worker, finished.model
        for end in finished.outputs:
            tokens = self._tokens.get(end.output_index, [])
            response.outputs.add(text="".join(t.text for t in tokens), tokens=tokens, end=end)


class _Talk:
    """One call of Converse: asks in, replies out, as many as there are in a message."""

    def __init__(self, worker: StubWorker, context: Any) -> None:
        self._worker = worker
        self._context = context
        self._jobs: dict[int, Job] = {}
        self._ready: list[worker_pb2.Reply] = []
        self._due = asyncio.Event()

    async def run(self) -> None:
        """Until the caller ends the call."""
        writer = asyncio.create_task(self._write())
        try:
            while (message := await self._context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self._take(message)
        finally:
            writer.cancel()
            for job in self._jobs.values():
                self._worker.machine.abort(job)

    def flush(self) -> None:
        """Writes what has gathered."""
        if self._ready:
            self._due.set()

    def _take(self, message: worker_pb2.ConverseRequest) -> None:
        ask, action = message.ask, message.WhichOneof("action")
        timeout = message.timeout_seconds if message.HasField("timeout_seconds") else None
        try:
            if action == "generate":
                sink = self._stream(ask)
                self._jobs[ask] = self._worker.submit(message.generate, sink, timeout)
            elif action == "complete":
                message.complete.whole = True
                self._jobs[ask] = self._worker.submit(message.complete, self._whole(ask), timeout)
            elif action == "score":
                self._worker.check_open()
                answer = scores(message.score, self._worker.settings)
                self._reply(worker_pb2.Reply(ask=ask, scores=answer, last=True))
            elif ask in self._jobs:
                self._worker.machine.abort(self._jobs.pop(ask))
        except Refusal as refusal:
            self._refuse(ask, refusal)
        self.flush()

    def _stream(self, ask: int) -> Callable[[Told], None]:
        def sink(told: Told) -> None:
            if isinstance(told, Refusal):
                self._refuse(ask, told)
                return
            self._ready.append(worker_pb2.Reply(ask=ask, event=told))
            if not told.HasField("delta"):
                self._reply(worker_pb2.Reply(ask=ask, last=True))

        return sink

    def _whole(self, ask: int) -> Callable[[Told], None]:
        gathered = _Gathered()

        def sink(told: Told) -> None:
            if isinstance(told, Refusal):
                self._refuse(ask, told)
                return
            gathered.take(told)
            if told.HasField("finished"):
                self._reply(worker_pb2.Reply(ask=ask, completion=gathered.response, last=True))

        return sink

    def _refuse(self, ask: int, refusal: Refusal) -> None:
        status = status_of(refusal).SerializeToString()
        self._reply(worker_pb2.Reply(ask=ask, status=status, last=True))

    def _reply(self, last: worker_pb2.Reply) -> None:
        self._jobs.pop(last.ask, None)
        self._ready.append(last)

    async def _write(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            ready, self._ready = self._ready, []
            await self._context.write(worker_pb2.ConverseResponse(replies=ready))


class _Stepper:
    """One call of Step."""

    def __init__(self, opened: worker_pb2.StepOpen, settings: Settings) -> None:
        request = opened.request
        made = len(request.made[0].ids) if request.made else 0
        self._settings = settings
        self._first = opened
        self._sequence = Sequence.of(request, 0, settings.weights, made)

    def opened(self) -> worker_pb2.StepResponse:
        """The first response."""
        response = self.take([], self._first.generate)
        request = self._first.request
        response.opened.CopyFrom(
            worker_pb2.StepOpened(
                prompt_ids=list(request.prompt.token_ids.ids),
                vocab_size=VOCABULARY,
                sampling=request.sampling,
                stop_ids=sorted(self._sequence.stops),
                worker=self._settings.name,
                model=self._settings.model,
                tokenizer_fingerprint=self._settings.tokenizer,
            )
        )
        return response

    def take(self, ids: list[int], generate: int) -> worker_pb2.StepResponse:
        """Tokens that the caller has chosen, then tokens that this worker chooses."""
        sequence = self._sequence
        sequence.take(ids)
        while generate and sequence.reason is None:
            ids.append(sequence.next())
            generate -= 1
        response = worker_pb2.StepResponse(position=sequence.position)
        response.tokens.extend(pb.Token(id=each, text=f"{each} ") for each in ids)
        if sequence.reason is not None:
            response.end.CopyFrom(sequence.end())
            return response
        return self._distribution(response)

    def _distribution(self, response: worker_pb2.StepResponse) -> worker_pb2.StepResponse:
        """A made-up one: halves from the true next token on."""
        following = Sequence(0, self._sequence.key, self._sequence.position, 2**62, 0, frozenset())
        first = following.next()
        for rank in range(min(self._first.candidates, VOCABULARY)):
            response.ids.append((first + rank) % VOCABULARY)
            response.logprobs.append(-math.log(2) * (rank + 1))
        return response


def scores(request: pb.ScoreRequest, settings: Settings) -> pb.ScoreResponse:
    """Made-up log-likelihoods, a function of the texts. Raises Refusal."""
    if not request.continuations:
        name = "continuations"
        raise Refusal(code_pb2.INVALID_ARGUMENT, f"{name}: is empty", field=name)
    counts = [max(1, each.ByteSize() // 4) for each in request.continuations]
    return pb.ScoreResponse(
        request_id=request.request_id,
        scores=[pb.Score(logprob=-0.5 * count, scored_tokens=count) for count in counts],
        worker=settings.name,
        model=settings.model,
    )


def status_of(refusal: Refusal) -> status_pb2.Status:
    """A refusal as a worker says it, with its details."""
    detail: Message
    if refusal.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(refusal.retry_after * 1e9))
        detail = error_details_pb2.RetryInfo(retry_delay=delay)
    elif refusal.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=refusal.field, description=refusal.message
        )
        detail = error_details_pb2.BadRequest(field_violations=[violation])
    else:
        detail = error_details_pb2.ErrorInfo(reason="stub", domain="conclave.v1")
    packed = AnyMessage()
    packed.Pack(detail)
    return status_pb2.Status(code=refusal.code, message=refusal.message, details=[packed])


async def _abort(context: Any, refusal: Refusal) -> NoReturn:
    trailing = ((DETAILS_KEY, status_of(refusal).SerializeToString()),)
    await context.abort(_CODES[refusal.code], refusal.message, trailing)
    raise AssertionError("abort returned")


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
