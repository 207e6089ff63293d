"""The gateway's side of `WorkerService.Step`: one answer that the gateway steps, on one worker."""

import asyncio
from collections.abc import Callable
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
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, heard: Heard, broken: Broken) -> None:
        """Begin to read; `broken` is called at most once, unless the line is closed first."""
        self._keep(asyncio.create_task(self._read(heard, broken), name="stepping"))

    def send(self, request: StepRequest) -> None:
        """Send a request; the one before must have been answered."""
        self._keep(asyncio.create_task(self._write(request)))

    def break_off(self, reason: str) -> None:
        """End the call because the worker does not move."""
        self._broken_off = Failure.of_error(Unavailable(f"the worker hangs: {reason}"))
        self._call.cancel()

    def close(self) -> None:
        """End the call; the worker frees the sequence."""
        self._call.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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


async def _error_of(call: Any) -> grpc.aio.AioRpcError:
    """What a call that ended while it was read has ended with."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
        None,
    )
