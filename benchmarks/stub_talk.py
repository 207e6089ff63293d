"""One call of Converse at a stub worker: asks in, replies out.

Given up: limits to what waits to be written.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import grpc.aio

from conclave.protos import generation_pb2 as pb
from conclave.protos import worker_pb2

from .stub_machine import Job, Machine, Refusal, Settings, Told
from .stub_replies import Gathered, scores, status_of


class Worker(Protocol):
    """Who is asked."""

    settings: Settings
    machine: Machine

    def submit(
        self, request: pb.GenerateRequest, sink: Callable[[Told], None], timeout: float | None
    ) -> Job:
        """Take a request on. Raises Refusal."""
        ...

    def check_open(self) -> None:
        """Raises Refusal unless it takes requests."""
        ...


class Talk:
    """One call of Converse: asks in, replies out, as many as there are in a message."""

    def __init__(self, worker: Worker, context: Any) -> None:
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
        gathered = Gathered()

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
