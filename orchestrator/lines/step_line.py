"""The gateway's side of `WorkerService.Step`: one answer that the gateway steps, on one worker."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from ...protos.worker_pb2 import StepRequest, StepResponse
from ...worker.errors import Unavailable
from ..status import Failure

Heard = Callable[[StepResponse], None]
Broken = Callable[[Failure], None]


class StepLine:
    """One call of Step; `closed` is done once nothing more comes."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._broken_off: Failure | None = None
        self._reading: asyncio.Task[None] | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, heard: Heard, broken: Broken) -> None:
        """Begin to read; `broken` is called at most once, unless the line is closed first."""
        self._reading = asyncio.create_task(self._read(heard, broken), name="stepping")

    def send(self, request: StepRequest) -> None:
        """Send a request, before this returns; the one before must have been answered."""
        advance(self._write(request))

    def break_off(self, reason: str) -> None:
        """End the call because the worker does not move."""
        self._broken_off = Failure.of_error(Unavailable(f"the worker hangs: {reason}"))
        self._call.cancel()

    def close(self) -> None:
        """End the call; the worker frees the sequence."""
        self._call.cancel()
        if self._reading is not None:
            self._reading.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    async def _write(self, request: StepRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader hears why

    async def _read(self, heard: Heard, broken: Broken) -> None:
        failure = Failure.of_error(Unavailable("the worker ended the steps"))
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                heard(response)
            if await self._call.code() is not grpc.StatusCode.OK:
                raise await _error_of(self._call)
        except grpc.aio.AioRpcError as error:
            failure = Failure.of_call(error)
        except asyncio.CancelledError:
            if self._broken_off is None:
                raise  # closed by ourselves
        if not self.closed.done():
            self.closed.set_result(None)
            broken(self._broken_off or failure)


def advance(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its first wait at once, and on from there when what it waits for is done.

    A task would only begin when the loop comes round, which costs a token's requests 0.1 ms. As an
    eager task of Python 3.12, but nobody can cancel it: it must end with what it waits for.
    """
    try:
        awaited = work.send(None)
    except (StopIteration, asyncio.CancelledError):
        return
    awaited._asyncio_future_blocking = False
    awaited.add_done_callback(lambda _: advance(work))


async def _error_of(call: Any) -> grpc.aio.AioRpcError:
    """What a call that ended while it was read has ended with."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
        None,
    )
