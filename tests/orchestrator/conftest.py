"""A fleet of scripted workers behind a real gateway, all over loopback gRPC in one event loop.

Each worker listens behind a small TCP relay, so that it can die as a killed process does: its
connections are reset and its port closes.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from conclave.orchestrator.client import AsyncClient
from conclave.orchestrator.config import GatewayConfig
from conclave.orchestrator.gateway.server import Gateway
from conclave.orchestrator.routing.registry import WorkerState
from conclave.protos import generation_pb2, worker_pb2, worker_pb2_grpc
from conclave.worker.serving.conversation import Conversation

SERVICE = "conclave.v1.WorkerService"
PATIENCE = 10.0


class Relay:
    """A TCP port in front of another, which can break like a dead process."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def kill(self) -> None:
        """Resets every connection and takes no new one."""
        assert self._server is not None
        self._server.close()
        self.cut()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, back_writer]
        with contextlib.suppress(OSError):
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back_writer))
                group.create_task(self._pump(back_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


Events = AsyncIterator[generation_pb2.GenerateResponse]
Script = Callable[["FakeWorker", generation_pb2.GenerateRequest, Any], Events]


class Scripts:
    """How a worker may behave; used as `worker.script = Scripts.die_after(2)`."""

    @staticmethod
    def answer(count: int = 3, pause: float = 0.0, first: float = 0.0) -> Script:
        async def script(worker: "FakeWorker", request: Any, context: Any) -> Events:
            await asyncio.sleep(first)
            for index in range(count):
                yield worker.delta(request, f"t{index} ")
                await asyncio.sleep(pause)
            yield worker.finished(request, count)

        return script

    @staticmethod
    def count(total: int = 6, pause: float = 0.0, die_at: int | None = None) -> Script:
        """Token i has id i and text "ti ", made ones are left out; perhaps it dies on the way."""

        async def script(worker: "FakeWorker", request: Any, context: Any) -> Events:
            made = len(request.made[0].ids) if request.made else 0
            for index in range(made, total):
                if index == die_at:
                    worker.relay.kill()
                    await asyncio.Event().wait()
                event = worker.delta(request, f"t{index} ")
                event.delta.tokens[0].id = index
                yield event
                await worker.received(request.request_id.split("~")[0], index + 1)
                await asyncio.sleep(pause)
            yield worker.finished(request, total)

        return script

    @staticmethod
    def say(text: str, pause: float = 0.0) -> Script:
        async def script(worker: "FakeWorker", request: Any, context: Any) -> Events:
            await asyncio.sleep(pause)
            yield worker.delta(request, text)
            yield worker.finished(request, 1)

        return script

    @staticmethod
    def die_after(count: int) -> Script:
        async def script(worker: "FakeWorker", request: Any, context: Any) -> Events:
            for index in range(count):
                yield worker.delta(request, f"t{index} ")
                # The relay is asynchronous: let it carry the event before it breaks.
                await worker.received(request.request_id, index + 1)
            worker.relay.kill()
            await asyncio.Event().wait()

        return script

    @staticmethod
    def hang() -> Script:
        async def script(worker: "FakeWorker", request: Any, context: Any) -> Events:
            await asyncio.Event().wait()
            yield worker.delta(request, "never")

        return script

    @staticmethod
    def stop_short(count: int) -> Script:
        async def script(worker: "FakeWorker", request: Any, context: Any) -> Events:
            for index in range(count):
                yield worker.delta(request, f"t{index} ")

        return script

    @staticmethod
    def fail_after(count: int, code: int = 14) -> Script:
        async def script(worker: "FakeWorker", request: Any, context: Any) -> Events:
            for index in range(count):
                yield worker.delta(request, f"t{index} ")
            error = generation_pb2.Error(code=code, message="scripted", retryable=code == 14)
            yield generation_pb2.GenerateResponse(
                request_id=request.request_id, failed=generation_pb2.Failed(error=error)
            )

        return script

    @staticmethod
    def refuse(code: grpc.StatusCode, *details: Any) -> Script:
        async def script(worker: "FakeWorker", request: Any, context: Any) -> Events:
            status = status_pb2.Status(code=code.value[0], message="scripted refusal")
            for detail in details:
                packed = AnyMessage()
                packed.Pack(detail)
                status.details.append(packed)
            trailing = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(code, "scripted refusal", trailing)
            yield worker.delta(request, "never")

        return script

    @staticmethod
    def invalid(field: str) -> Script:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="is bad")
        detail = error_details_pb2.BadRequest(field_violations=[violation])
        return Scripts.refuse(grpc.StatusCode.INVALID_ARGUMENT, detail)

    @staticmethod
    def full(seconds: int) -> Script:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromSeconds(seconds)
        return Scripts.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, info)


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One scripted worker process."""

    def __init__(self, name: str, incarnation: str, model: str = "fake") -> None:
        self.name = name
        self.incarnation = incarnation
        self.model = model
        self.labels: dict[str, str] = {}
        self.weights = name
        self.max_sequences = 0
        self.precision: generation_pb2.Precision | None = None
        self.load = worker_pb2.GetLoadResponse()
        self.silent = False
        self.script = Scripts.answer()
        self.asked: list[Any] = []
        self.scored: list[Any] = []
        self.timeouts: list[float | None] = []
        self.cancelled = 0
        self.running = 0
        self.address = ""
        self.relay: Any = None
        self.seen: dict[str, int] = {}
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: Any = None

    async def start(self) -> None:
        self._server = server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self.set_serving(True)
        self.relay = Relay(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        self.address = f"127.0.0.1:{await self.relay.start()}"

    async def stop(self) -> None:
        self.relay.kill()
        await self._server.stop(None)

    async def set_serving(self, serving: bool) -> None:
        answer = health_pb2.HealthCheckResponse
        await self._health.set(SERVICE, answer.SERVING if serving else answer.NOT_SERVING)

    async def received(self, request_id: str, count: int) -> None:
        """Waits until the test has seen so many events of a request."""
        async with asyncio.timeout(PATIENCE):
            while self.seen.get(request_id, 0) < count:
                await asyncio.sleep(0.005)

    def delta(self, request: Any, text: str) -> generation_pb2.GenerateResponse:
        token = generation_pb2.Token(id=len(self.asked), text=text)
        return generation_pb2.GenerateResponse(
            request_id=request.request_id, delta=generation_pb2.Delta(tokens=[token])
        )

    def finished(self, request: Any, count: int) -> generation_pb2.GenerateResponse:
        end = generation_pb2.OutputEnd(
            reason=generation_pb2.FINISH_REASON_LENGTH, completion_tokens=count
        )
        finished = generation_pb2.Finished(
            outputs=[end],
            usage=generation_pb2.Usage(prompt_tokens=5, completion_tokens=count),
            timings=generation_pb2.Timings(queued=0.1, first_token=0.2, total=0.5),
            worker=self.name,
            model=self.model,
        )
        return generation_pb2.GenerateResponse(request_id=request.request_id, finished=finished)

    async def Describe(self, request: Any, context: Any) -> worker_pb2.DescribeResponse:
        return worker_pb2.DescribeResponse(
            worker=self.name,
            model=self.model,
            labels=self.labels,
            incarnation=self.incarnation,
            device="cpu",
            model_fingerprint=self.weights,
            tokenizer_fingerprint="tokenizer",
            max_sequences=self.max_sequences,
            precision=self.precision,
        )

    async def WatchLoad(self, request: Any, context: Any) -> Any:
        while True:
            if not self.silent:
                yield self.load
            await asyncio.sleep(0.02)

    async def Generate(self, request: Any, context: Any) -> Events:
        self.asked.append(request)
        self.timeouts.append(context.time_remaining())
        self.running += 1
        try:
            async for event in self.script(self, request, context):
                yield event
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def Complete(self, request: Any, context: Any) -> generation_pb2.CompleteResponse:
        response = generation_pb2.CompleteResponse(request_id=request.request_id)
        output = generation_pb2.Output()
        async for event in self.Generate(request, context):
            if event.HasField("delta"):
                output.tokens.extend(event.delta.tokens)
                continue
            if event.HasField("failed"):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")
            output.text = "".join(token.text for token in output.tokens)
            output.end.CopyFrom(event.finished.outputs[0])
            response.outputs.append(output)
            response.usage.CopyFrom(event.finished.usage)
            response.timings.CopyFrom(event.finished.timings)
            response.worker, response.model = self.name, self.model
        return response

    async def Converse(self, requests: Any, context: Any) -> None:
        limit = int(dict(context.invocation_metadata())["conclave-message-bytes"])
        await Conversation(self, limit).run(context)

    async def Score(self, request: Any, context: Any) -> generation_pb2.ScoreResponse:
        self.scored.append(request)
        scores = [
            generation_pb2.Score(logprob=-1.0 - index, scored_tokens=2)
            for index, _ in enumerate(request.continuations)
        ]
        return generation_pb2.ScoreResponse(scores=scores, worker=self.name, model=self.model)


class Rig:
    """A gateway and its workers; an async context manager."""

    Scripts = Scripts

    def __init__(self, count: int, **settings: Any) -> None:
        self.gateway = Gateway(GatewayConfig(port=0, **settings), fleet="test")
        self.workers = [FakeWorker(f"w{index}", f"w{index}.1") for index in range(count)]
        self.old: list[FakeWorker] = []

    async def __aenter__(self) -> "Rig":
        await self.gateway.start()
        for worker in self.workers:
            await worker.start()
            self.introduce(worker)
        self.client = AsyncClient(self.gateway.address, timeout=PATIENCE)
        self.channel = grpc.aio.insecure_channel(self.gateway.address)
        await self.until(lambda: all(self.state(w) is WorkerState.SERVING for w in self.workers))
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self.client.close()
        await self.channel.close(None)
        await self.gateway.stop(grace=0.0)
        for worker in self.workers + self.old:
            await worker.stop()

    def introduce(self, worker: FakeWorker) -> None:
        self.gateway.located(worker.name, worker.address, worker.incarnation)

    async def replace(self, index: int) -> FakeWorker:
        """A new process of a worker, on a new port."""
        old = self.workers[index]
        self.old.append(old)
        new = FakeWorker(old.name, old.incarnation + "+")
        self.workers[index] = new
        await new.start()
        self.introduce(new)
        return new

    def state(self, worker: FakeWorker) -> WorkerState:
        return self.gateway.registry.workers[worker.name].state

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not holds():
                await asyncio.sleep(0.005)

    async def events(self, **fields: Any) -> list[Any]:
        """The raw events of one stream, telling the workers how many have arrived."""
        from conclave.protos import gateway_pb2, gateway_pb2_grpc

        stub: Any = gateway_pb2_grpc.GatewayServiceStub(self.channel)
        request = generation_pb2.GenerateRequest(
            request_id=fields.pop("request_id", "r"), prompt=generation_pb2.Prompt(text="hello")
        )
        envelope = gateway_pb2.GatewayGenerateRequest(request=request, **fields)
        got = []
        async for event in stub.Generate(envelope, timeout=PATIENCE):
            got.append(event)
            for worker in self.workers:
                worker.seen[request.request_id] = len(got)
        return got


@pytest.fixture
def rig() -> type[Rig]:
    return Rig


class LiveRig:
    """A rig of two workers on a loop of its own, for callers that block."""

    def __init__(self) -> None:
        self.rig = Rig(2)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.call(self.rig.__aenter__())
        self.address = self.rig.gateway.address

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def script(self, script: Script) -> None:
        """Lets both workers behave so."""
        for worker in self.rig.workers:
            worker.script = script

    def until(self, holds: Callable[[], bool]) -> None:
        self.call(self.rig.until(holds))

    def close(self) -> None:
        self.call(self.rig.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


@pytest.fixture
def live() -> Iterator[LiveRig]:
    live = LiveRig()
    yield live
    live.close()


@pytest.fixture
def scripts() -> type[Scripts]:
    return Scripts


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a scenario to its end, or fails after a while."""

    def runner(scenario: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(3 * PATIENCE):
                await scenario

        asyncio.run(bounded())

    return runner
