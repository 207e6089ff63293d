"""The gateway's line to one process of one worker: a channel, its calls, and its health stream.

The health stream stays open as long as the worker lives, so a drain or a death is seen within
milliseconds and not at the next poll. Asks go through one conversation. Calls are made by hand
instead of through the generated stub, which has no types.
"""

import asyncio
import contextlib
from typing import Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from ...protos import worker_pb2
from .conversation import Conversation, Pending

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
MESSAGE_BYTES = "conclave-message-bytes"
"""Metadata key: the largest message that we take."""
REWATCH_SECONDS = 0.2
DESCRIBE_SECONDS = 5.0

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
        self, name: str, address: str, incarnation: str, max_message_mib: int, listener: Listener
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self._listener = listener
        self._channel = grpc.aio.insecure_channel(address, channel_options(max_message_mib))
        self._watching: asyncio.Task[None] | None = None
        unary, stream = self._channel.unary_unary, self._channel.unary_stream
        converse = self._channel.stream_stream(
            f"/{SERVICE}/Converse",
            worker_pb2.ConverseRequest.SerializeToString,
            worker_pb2.ConverseResponse.FromString,
        )
        size = str(max_message_mib * 1024 * 1024)
        limit = ((MESSAGE_BYTES, size),)
        self._conversation = Conversation(
            lambda: converse(metadata=limit)  # type: ignore[call-arg]
        )
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

    async def close(self) -> None:
        """Ends every call on this line."""
        await self._conversation.close()
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self._channel.close(None)

    async def _follow(self) -> None:
        while True:
            try:
                reason = await self._follow_stream()
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
            self._listener.unreachable(self, reason)
            await asyncio.sleep(REWATCH_SECONDS)

    async def _follow_stream(self) -> str:
        """Returns why it ended, or raises what gRPC says."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        async for response in self._watch(request, wait_for_ready=True):
            if response.status != health_pb2.HealthCheckResponse.SERVING:
                self._listener.draining(self)
                continue
            about = await self._describe(worker_pb2.DescribeRequest(), timeout=DESCRIBE_SECONDS)
            if about.incarnation != self.incarnation:
                return "another process has taken its address"
            self._listener.serving(self, about)
        return "its health stream ended"
