"""`WorkerService.Converse`: many asks over one call, each answered as if it had a call of its own.

Setting up a gRPC call costs the Python server and client about as much as a short answer: a unary
hop takes 1.1 ms where a message on an open call and its reply take 0.6 (both with the 0.9 ms of a
neighbour's call on two cores). Replies that are ready together leave in one message. What it gave
up: flow control for each ask; an ask's replies are bounded by its max_tokens instead.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import grpc
from google.rpc import status_pb2

from ...protos import generation_pb2 as pb
from ...protos import worker_pb2
from .wire import DETAILS_KEY

log = logging.getLogger(__name__)

MESSAGE_BYTES = "conclave-message-bytes"
"""Metadata key of the call: the largest message that the caller takes."""

Trailing = tuple[tuple[str, bytes], ...]


class Service(Protocol):
    """The calls that a conversation carries."""

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Any:
        """An async iterator of events."""

    async def Complete(self, request: pb.GenerateRequest, context: Any) -> pb.CompleteResponse:
        """One message."""

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """One message."""


class Refused(Exception):
    """An ask has ended with a status."""

    def __init__(self, status: bytes) -> None:
        super().__init__("refused")
        self.status = status


class AskContext:
    """What a call's servicer context is to its method, for one ask of a conversation."""

    def __init__(self, timeout: float | None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def time_remaining(self) -> float | None:
        """Seconds until the ask's deadline; None without one."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    async def abort(self, code: grpc.StatusCode, message: str, trailing: Trailing = ()) -> NoReturn:
        """End the ask with a status."""
        bare = status_pb2.Status(code=code.value[0], message=message)
        raise Refused(dict(trailing).get(DETAILS_KEY, bare.SerializeToString()))


class Conversation:
    """One call of Converse.

    Args:
        service: answers the asks.
        limit: bytes that one message may have.
    """

    def __init__(self, service: Service, limit: int) -> None:
        self._service = service
        self._limit = limit
        self._asks: dict[int, asyncio.Task[None]] = {}
        self._ready: list[worker_pb2.Reply] = []
        self._wake = asyncio.Event()

    async def run(self, context: Any) -> None:
        """Take asks and write replies until the caller ends the call; then nothing goes on."""
        writer = asyncio.create_task(self._write(context))
        try:
            while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self._take(message)
        finally:
            for task in (writer, *self._asks.values()):
                task.cancel()

    def _take(self, message: worker_pb2.ConverseRequest) -> None:
        ask = message.ask
        if message.WhichOneof("action") == "cancel":
            if ask in self._asks:
                self._asks[ask].cancel()
            return
        self._asks[ask] = asyncio.create_task(self._answer(message))
        self._asks[ask].add_done_callback(lambda _: self._asks.pop(ask))

    async def _answer(self, message: worker_pb2.ConverseRequest) -> None:
        timeout = message.timeout_seconds if message.HasField("timeout_seconds") else None
        reply = worker_pb2.Reply(ask=message.ask, last=True)
        try:
            await self._fill(reply, message, AskContext(timeout))
        except Refused as refusal:
            reply.status = refusal.status
        except Exception:
            log.exception("an ask broke")
            broken = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message="broken")
            reply.status = broken.SerializeToString()
        self._put(reply)

    async def _fill(
        self, reply: worker_pb2.Reply, message: worker_pb2.ConverseRequest, context: AskContext
    ) -> None:
        """Answer an ask; `reply` becomes its last word."""
        match message.WhichOneof("action"):
            case "generate":
                async for event in self._service.Generate(message.generate, context):
                    self._put(worker_pb2.Reply(ask=message.ask, event=event))
            case "complete":
                reply.completion.CopyFrom(await self._service.Complete(message.complete, context))
            case "score":
                reply.scores.CopyFrom(await self._service.Score(message.score, context))
            case _:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "action: is missing")

    def _put(self, reply: worker_pb2.Reply) -> None:
        self._ready.append(reply)
        self._wake.set()

    async def _write(self, context: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            ready, self._ready = self._ready, []
            for message in _messages(ready, self._limit):
                await context.write(message)


def _messages(replies: list[worker_pb2.Reply], limit: int) -> Iterator[worker_pb2.ConverseResponse]:
    """The replies in as few messages as the limit allows; one that is too large is refused.

    gRPC would end the whole call for it, and all other asks with it.
    """
    message, size = worker_pb2.ConverseResponse(), 0
    for reply in replies:
        length = reply.ByteSize()
        if length > limit:
            reply, length = _too_large(reply, limit), 0
        if size + length > limit:
            yield message
            message, size = worker_pb2.ConverseResponse(), 0
        message.replies.append(reply)
        size += length
    yield message


def _too_large(reply: worker_pb2.Reply, limit: int) -> worker_pb2.Reply:
    status = status_pb2.Status(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
        message=f"the answer has {reply.ByteSize()} bytes, a message at most {limit}; ask for less",
    )
    return worker_pb2.Reply(ask=reply.ask, status=status.SerializeToString(), last=True)
