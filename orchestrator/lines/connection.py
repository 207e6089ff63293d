"""The gateway's line to one process of one worker: a channel, its calls, and its health stream.

The health stream stays open as long as the worker lives, so a drain or a death is seen within
milliseconds and not at the next poll. A process that hangs keeps its streams open, so a second
stream brings heartbeats: when they stop, or tell that the engine stands still, the worker counts as
hung until they are well again. Asks go through one conversation. Calls are made by hand instead of
through the generated stub, which has no types.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from ...protos import worker_pb2
from ..routing.pace import Pace
from ..routing.registry import Beat
from ..security.channels import WithMetadata, fleet_metadata
from .conversation import Conversation, Pending
from .nearest import nearest
from .step_line import StepLine

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
MESSAGE_BYTES = "conclave-message-bytes"
"""Metadata key: the largest message that we take."""
REWATCH_SECONDS = 0.2
BEAT_SECONDS = 0.5
DESCRIBE_SECONDS = 5.0
WORKER_OPTIONS = [("grpc.enable_retries", 0)]
"""The gateway repeats asks itself; gRPC's own retries would hold a copy of every message."""

UnaryCall = grpc.aio.UnaryUnaryMultiCallable
StreamCall = grpc.aio.UnaryStreamMultiCallable


class Listener(Protocol):
    """Who wants to know what the health stream says."""

    def serving(self, connection: "Connection", about: worker_pb2.DescribeResponse) -> None:
        """The worker serves, and has said what it is."""

    def draining(self, connection: "Connection") -> None:
        """The worker takes no new requests."""

    def unreachable(self, connection: "Connection", reason: str) -> None:
        """The stream broke; the connection goes on trying."""

    def beat(self, connection: "Connection", beat: Beat) -> None:
        """A heartbeat, with the worker's load."""

    def hung(self, connection: "Connection", reason: str) -> None:
        """The worker does not move; every ask to it has been failed."""

    def revived(self, connection: "Connection") -> None:
        """A worker that hung moves again, and its health stream says that it serves."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker may stand still before it counts as hung, in seconds."""

    silent: float
    """Without a heartbeat: the process."""
    stuck: float
    """Without an end of the present step: the engine."""


def channel_options(max_message_mib: int) -> list[tuple[str, int]]:
    """Options of every channel and server of the orchestrator.

    A peer that stopped without closing its sockets is found out after 20 + 10 seconds.
    """
    size = max_message_mib * 1024 * 1024
    return [
        ("grpc.max_send_message_length", size),
        ("grpc.max_receive_message_length", size),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


class Connection:
    """One worker process; a restarted worker gets a new one."""

    def __init__(
        self,
        name: str,
        address: str,
        incarnation: str,
        max_message_mib: int,
        patience: Patience,
        listener: Listener,
        secret: str = "",
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self._listener = listener
        options = channel_options(max_message_mib) + WORKER_OPTIONS
        self._channel = grpc.aio.insecure_channel(nearest(address), options)
        self._patience = patience
        self._serves = False
        self._hangs = False
        self._pace = Pace()
        self._step_lines: set[StepLine] = set()
        self._watching: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        line = WithMetadata(self._channel, fleet_metadata(secret))
        unary, stream = line.unary_unary, line.unary_stream
        converse = line.stream_stream(
            f"/{SERVICE}/Converse",
            worker_pb2.ConverseRequest.SerializeToString,
            worker_pb2.ConverseResponse.FromString,
        )
        size = str(max_message_mib * 1024 * 1024)
        limit = ((MESSAGE_BYTES, size),)
        self._conversation = Conversation(lambda: converse(metadata=limit))
        self._describe: UnaryCall[worker_pb2.DescribeRequest, worker_pb2.DescribeResponse] = unary(
            f"/{SERVICE}/Describe",
            worker_pb2.DescribeRequest.SerializeToString,
            worker_pb2.DescribeResponse.FromString,
        )
        self._watch: StreamCall[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse] = (
            stream(
                "/grpc.health.v1.Health/Watch",
                health_pb2.HealthCheckRequest.SerializeToString,
                health_pb2.HealthCheckResponse.FromString,
            )
        )

        self._step = line.stream_stream(
            f"/{SERVICE}/Step",
            worker_pb2.StepRequest.SerializeToString,
            worker_pb2.StepResponse.FromString,
        )
        self._watch_load: StreamCall[worker_pb2.WatchLoadRequest, worker_pb2.GetLoadResponse] = (
            stream(
                f"/{SERVICE}/WatchLoad",
                worker_pb2.WatchLoadRequest.SerializeToString,
                worker_pb2.GetLoadResponse.FromString,
            )
        )

    def open(self) -> None:
        """Starts to follow the worker's health, anew if it is being followed already."""
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.create_task(self._follow(), name=f"health of {self.name}")

    def ask(self, request: worker_pb2.ConverseRequest, timeout: float | None) -> Pending:
        """Asks the worker; `timeout` in seconds goes along."""
        if timeout is not None:
            request.timeout_seconds = timeout
        return self._conversation.ask(request)

    def step(self, timeout: float | None) -> StepLine:
        """A line to one answer that is made step by step; `timeout` in seconds bounds it all."""
        line = StepLine(self._step(timeout=timeout))
        self._step_lines.add(line)
        line.closed.add_done_callback(lambda _: self._step_lines.discard(line))
        return line

    async def finish(self) -> None:
        """Closes the line when the asks on it have ended."""
        while self._conversation.busy:
            await asyncio.sleep(REWATCH_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Ends every call on this line."""
        await self._conversation.close()
        tasks = [task for task in (self._watching, self._listening) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close(None)

    async def _follow(self) -> None:
        while True:
            try:
                reason = await self._follow_stream()
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
            self._serves = False
            self._listener.unreachable(self, reason)
            await asyncio.sleep(REWATCH_SECONDS)

    async def _follow_stream(self) -> str:
        """Returns why it ended, or raises what gRPC says."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        async for response in self._watch(request, wait_for_ready=True):
            if response.status != health_pb2.HealthCheckResponse.SERVING:
                self._serves = False
                self._listener.draining(self)
                continue
            about = await self._describe(worker_pb2.DescribeRequest(), timeout=DESCRIBE_SECONDS)
            if about.incarnation != self.incarnation:
                return "another process has taken its address"
            self._serves, self._hangs = True, False
            self._listener.serving(self, about)
            if self._listening is None or self._listening.done():
                self._listening = asyncio.create_task(self._listen(), name=f"beat of {self.name}")
        return "its health stream ended"

    async def _listen(self) -> None:
        """Follows the heartbeats while the worker serves; a break is the health stream's matter."""
        while self._serves:
            request = worker_pb2.WatchLoadRequest(interval_seconds=BEAT_SECONDS)
            call = self._watch_load(request)
            try:
                await self._hear(call)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    return  # another kind of worker: it has its health stream only
            finally:
                call.cancel()
            await asyncio.sleep(REWATCH_SECONDS)

    async def _hear(self, call: Any) -> None:
        """Takes the heartbeats of one call, until it breaks."""
        beats = aiter(call)
        arriving = asyncio.ensure_future(anext(beats))
        try:
            while True:
                await asyncio.wait((arriving,), timeout=self._patience.silent)
                if not arriving.done():
                    self._hang(f"no heartbeat for {self._patience.silent:g} s")
                    await asyncio.wait((arriving,))
                try:
                    load = arriving.result()
                except StopAsyncIteration:
                    return
                arriving = asyncio.ensure_future(anext(beats))
                self._judge(load)
        finally:
            arriving.cancel()

    def _judge(self, load: worker_pb2.GetLoadResponse) -> None:
        if load.step_age_seconds > self._patience.stuck:
            self._hang(f"its engine has not moved for {load.step_age_seconds:.0f} s")
            return
        if self._hangs:
            self._hangs = False
            if self._serves:
                self._listener.revived(self)
        beat = self._pace.beat(
            now=time.monotonic(),
            running=load.running_sequences,
            completed=load.completion_tokens,
            outstanding=load.outstanding_tokens,
            rate=load.tokens_per_second,
        )
        self._listener.beat(self, beat)

    def _hang(self, reason: str) -> None:
        if not self._hangs:
            self._hangs = True
            self._conversation.break_off(reason)
            for line in tuple(self._step_lines):
                line.break_off(reason)
            self._listener.hung(self, reason)
