"""`WorkerService.Step`: one answer over one call, stepped by the caller.

Requests of the caller and events of the engine come into one inbox, so that a failure is told at
once, also while the caller thinks. A step's way is as short as can be: what the caller sends goes
from the loop into the engine's queue, the response comes back by one `call_soon_threadsafe`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Items
from typing import Any

import grpc

from ...protos import generation_pb2 as pb
from ...protos import worker_pb2
from ..engine import Engine
from ..errors import InvalidRequest
from ..requests.events import Event, Failed, Opened, Request, Stepped
from . import wire
from .asks import Build, OpenAsks

Open = Callable[[worker_pb2.StepOpen], Awaitable[Build]]
"""Checks and tokenises."""


class StepCall:
    """One call of Step.

    Args:
        engine: answers.
        open_request: makes a checked request of the first message.
        asks: where the request counts as open until its answer has ended.
        about: what the first response tells of this worker.
    """

    def __init__(
        self, engine: Engine, open_request: Open, asks: OpenAsks, about: worker_pb2.StepOpened
    ) -> None:
        self._engine = engine
        self._open_request = open_request
        self._asks = asks
        self._about = about
        self._loop = asyncio.get_running_loop()
        self._inbox = asyncio.Queue[worker_pb2.StepRequest | Items[Event] | None]()
        self._answered = asyncio.Event()
        self._ended = False

    async def run(self, context: Any) -> None:
        """Answer each request until the caller ends the call; then its sequence is free.

        Raises:
            ConclaveError: the call ends with it.
        """
        reader = asyncio.create_task(self._read(context))
        try:
            request = await self._open()
            if request is not None:
                with self._asks.track(request.id):
                    await self._answer(request, context)
                if self._ended:  # else the caller has left before
                    await self._after_the_end()
        finally:
            reader.cancel()

    async def _open(self) -> Request | None:
        """The request that the first message asks for; None if the caller has left instead."""
        first = await self._inbox.get()
        if first is None:
            return None
        assert isinstance(first, worker_pb2.StepRequest)
        if first.WhichOneof("action") != "open":
            raise InvalidRequest.of(first.WhichOneof("action") or "open", "the first must be open")
        build = await self._open_request(first.open)
        return await build(self._put)

    async def _answer(self, request: Request, context: Any) -> None:
        """Run the steps of a request to its end; leaving early takes it out of the engine."""
        self._engine.submit(request)
        try:
            async for response in self._responses(request.id):
                await context.write(response)
                self._answered.set()
        finally:
            if not self._ended:
                self._engine.abort(request.id)

    async def _responses(self, request_id: str) -> AsyncIterator[worker_pb2.StepResponse]:
        while not self._ended and (arrived := await self._inbox.get()) is not None:
            if isinstance(arrived, worker_pb2.StepRequest):
                self._take(request_id, arrived)
                continue
            for event in arrived:
                self._ended = isinstance(event, Failed) or event.end is not None  # type: ignore[union-attr]
                if isinstance(event, Failed):
                    raise event.error
                assert isinstance(event, Stepped)
                yield response(event, self._about)

    def _take(self, request_id: str, message: worker_pb2.StepRequest) -> None:
        if message.WhichOneof("action") == "open":
            raise InvalidRequest.of("open", "the answer is open already")
        if message.WhichOneof("action") is None:
            raise InvalidRequest.of("take", "is missing")
        self._engine.take(request_id, list(message.take.ids), message.take.generate)

    async def _after_the_end(self) -> None:
        """Wait until the caller ends the call too."""
        while (late := await self._inbox.get()) is not None:
            if isinstance(late, worker_pb2.StepRequest):
                raise InvalidRequest.of("take", "the answer has ended")

    async def _read(self, context: Any) -> None:
        """Bring the caller's requests in, each once the one before it has its response."""
        try:
            while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self._answered.clear()
                self._inbox.put_nowait(message)
                await self._answered.wait()
        finally:
            self._inbox.put_nowait(None)

    def _put(self, events: Items[Event]) -> None:
        """The request's sink: from the engine's thread into the loop, if that still runs."""
        try:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, events)
        except RuntimeError:
            pass


def response(step: Stepped, about: worker_pb2.StepOpened) -> worker_pb2.StepResponse:
    """One step's response as a message."""
    message = worker_pb2.StepResponse(
        position=step.position,
        tokens=map(wire.token, step.tokens),
        end=None if step.end is None else wire.output_end(step.end),
        ids=step.ids,
        logprobs=step.logprobs,
    )
    if step.opened is not None:
        message.opened.CopyFrom(about)
        _fill(message.opened, step.opened)
    return message


def _fill(message: worker_pb2.StepOpened, opened: Opened) -> None:
    message.prompt_ids.extend(opened.prompt)
    message.cached_tokens = opened.cached_tokens
    sampling = opened.sampling.model_dump(exclude_none=True)
    message.sampling.CopyFrom(pb.SamplingParams(**sampling))
    message.stop_ids.extend(opened.stop_ids)
    message.suppressed_ids.extend(opened.suppressed_ids)
