"""The gateway's side of `WorkerService.Converse`: every ask to a worker over one open call.

An ask costs a message each way instead of a call. If the call breaks, every open ask fails as its
own call would have, and the next ask opens a new one.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from ...protos.worker_pb2 import CancelAsk, ConverseRequest, Reply
from ...worker.errors import Unavailable
from ..status import Failure

OpenCall = Callable[[], Any]
"""Makes a new grpc.aio call of Converse."""


class Pending:
    """One ask under way; close it when nobody wants more of it."""

    def __init__(self, conversation: "Conversation", ask: int) -> None:
        self._conversation = conversation
        self._ask = ask
        self._arrived: deque[Reply | Failure] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> Reply:
        """The next reply. Raises Failure if the call broke, or the ask ended with a status."""
        if not self._arrived:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        reply = self._arrived.popleft()
        if isinstance(reply, Failure):
            raise reply
        if reply.WhichOneof("content") == "status":
            raise Failure.of_status(reply.status)
        return reply

    def peek(self) -> Reply | None:
        """The next reply if it is there and good; it stays."""
        first = self._arrived[0] if self._arrived else None
        if isinstance(first, Reply) and first.WhichOneof("content") == "event":
            return first
        return None

    def put(self, reply: Reply | Failure) -> None:
        """One more reply, from the conversation."""
        self._arrived.append(reply)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Takes the ask out of the worker, unless it has ended."""
        self._conversation.cancel(self._ask)


class Conversation:
    """All asks to one process of one worker."""

    def __init__(self, open_call: OpenCall) -> None:
        self._open_call = open_call
        self._call: Any = None
        self._asks = 0
        self._pending: dict[int, Pending] = {}
        self._unsent: deque[ConverseRequest] = deque()
        self._wake = asyncio.Event()
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    @property
    def busy(self) -> bool:
        """Whether an ask is open."""
        return bool(self._pending)

    def ask(self, request: ConverseRequest) -> Pending:
        """Sends an ask; its number is set here."""
        if self._call is None:
            self._begin()
        self._asks += 1
        request.ask = self._asks
        pending = self._pending[self._asks] = Pending(self, self._asks)
        self._send(request)
        return pending

    def cancel(self, ask: int) -> None:
        """Gives an ask up; a no-op if it has ended."""
        if self._pending.pop(ask, None) is not None:
            self._send(ConverseRequest(ask=ask, cancel=CancelAsk()))

    def break_off(self, reason: str) -> None:
        """Ends the call because the worker does not move; every open ask fails as UNAVAILABLE."""
        if self._call is not None:
            failure = Failure.of_error(Unavailable(f"the worker hangs: {reason}"))
            self._tasks[0].cancel()
            self._end(self._call, failure)

    async def close(self) -> None:
        """Ends the call and with it every ask."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self) -> None:
        self._call = self._open_call()
        self._unsent.clear()
        self._tasks = (
            asyncio.create_task(self._read(self._call), name="conversation, reading"),
            asyncio.create_task(self._write(self._call), name="conversation, writing"),
        )

    def _send(self, request: ConverseRequest) -> None:
        self._unsent.append(request)
        self._wake.set()

    async def _write(self, call: Any) -> None:
        while True:
            while self._unsent:
                try:
                    await call.write(self._unsent.popleft())
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the reader hears why
            self._wake.clear()
            await self._wake.wait()

    async def _read(self, call: Any) -> None:
        failure = Failure(grpc.StatusCode.UNAVAILABLE, "the worker ended the conversation")
        try:
            while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                for reply in message.replies:
                    self._deliver(reply)
        except grpc.aio.AioRpcError as error:
            failure = Failure.of_call(error)
        finally:
            self._end(call, failure)

    def _deliver(self, reply: Reply) -> None:
        pending = self._pending.get(reply.ask)
        if pending is not None:
            pending.put(reply)
            if reply.last:
                del self._pending[reply.ask]

    def _end(self, call: Any, failure: Failure) -> None:
        call.cancel()
        if self._call is not call:
            return  # broken off before
        self._call = None
        self._tasks[1].cancel()
        broken, self._pending = self._pending, {}
        for pending in broken.values():
            pending.put(failure)
