"""The life of one ask inside the gateway: pick a worker, ask it, try the next one if it fails.

An ask may be repeated as long as its caller has seen nothing of an answer. From the first event on
it belongs to one worker, and its stream ends with exactly one terminal event. Nothing here formats
or logs on the way of a good answer: this is the path whose cost is counted.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import grpc
import grpc.aio

from ...protos.generation_pb2 import (
    CompleteResponse,
    GenerateRequest,
    GenerateResponse,
    ScoreRequest,
    ScoreResponse,
)
from ...protos.worker_pb2 import ConverseRequest, Reply
from ...worker.errors import Unavailable
from ..config import GatewayConfig
from ..lines.connection import Connection
from ..lines.conversation import Pending
from ..routing.registry import Registry, Worker
from ..routing.router import Selector, Turn, choose, matching, turn
from ..status import Failure

Write = Callable[[GenerateResponse], Awaitable[None]]


@dataclass(slots=True)
class Ask:
    """One request under way."""

    selector: Selector
    remaining: Callable[[], float | None]
    """Seconds until its deadline; None without one."""
    tried: set[Turn] = field(default_factory=set)
    attempts: int = 0
    failure: Failure | None = None
    """The last one; RESOURCE_EXHAUSTED stays, because it tells the caller most."""
    patience_ends: float | None = None


@dataclass(slots=True)
class Counters:
    """Since the gateway's start."""

    requests: int = 0
    retries: int = 0
    failures: int = 0


class Dispatcher:
    """Brings asks to workers. Lives on the gateway's event loop."""

    def __init__(
        self, registry: Registry, connections: Mapping[str, Connection], config: GatewayConfig
    ) -> None:
        self.counters = Counters()
        self._registry = registry
        self._connections = connections
        self._config = config
        self._waiting: set[asyncio.Future[None]] = set()

    async def complete(self, ask: Ask, request: GenerateRequest) -> CompleteResponse:
        """A whole answer. Raises Failure or a typed error."""
        return (await self._answer(ask, ConverseRequest(complete=request))).completion

    async def score(self, ask: Ask, request: ScoreRequest) -> ScoreResponse:
        """Log-likelihoods. Raises Failure or a typed error."""
        return (await self._answer(ask, ConverseRequest(score=request))).scores

    async def stream(self, ask: Ask, request: GenerateRequest, write: Write) -> None:
        """A stream of events. Raises Failure or a typed error if nothing has been written."""
        self.counters.requests += 1
        message = ConverseRequest(generate=request)
        while True:
            worker, connection = await self._pick(ask)
            worker.open_requests += 1
            pending = connection.ask(message, ask.remaining())
            try:
                begun, failure = await self._relay(pending, write)
                if failure is not None:
                    failure = self._examine(connection, failure)
                    if begun:
                        self.counters.failures += 1
                        await write(failure.event(request.request_id))
                if failure is None or begun:
                    worker.served_requests += 1
                    return
            finally:
                worker.open_requests -= 1
                pending.close()
            self._failed(ask, failure)

    async def _answer(self, ask: Ask, message: ConverseRequest) -> Reply:
        """The one reply to a message."""
        self.counters.requests += 1
        while True:
            worker, connection = await self._pick(ask)
            worker.open_requests += 1
            pending = connection.ask(message, ask.remaining())
            try:
                reply = await pending.next()
                worker.served_requests += 1
                return reply
            except Failure as error:
                failure = self._examine(connection, error)
            finally:
                worker.open_requests -= 1
                pending.close()
            self._failed(ask, failure)

    def workers_changed(self) -> None:
        """Lets the waiting asks look again."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    @staticmethod
    async def _relay(pending: Pending, write: Write) -> tuple[bool, Failure | None]:
        """Passes a worker's events on: whether any was written, and why the end is missing."""
        begun = ended = False
        try:
            while not ended:
                reply = await pending.next()
                if reply.last:
                    failure = Failure.of_error(Unavailable("the worker sent no end"))
                    return begun, failure
                event = reply.event
                kind = event.WhichOneof("event")
                if kind == "failed" and not begun:
                    return False, Failure.of_event(event.failed.error)
                await write(event)
                begun, ended = True, kind != "delta"
        except Failure as failure:
            return begun, failure
        return begun, None

    async def _pick(self, ask: Ask) -> tuple[Worker, Connection]:
        worker = choose(self._registry.workers.values(), ask.selector, ask.tried)
        if worker is None:
            worker = await self._wait(ask)
        ask.attempts += 1
        ask.tried.add(turn(worker))
        return worker, self._connections[worker.name]

    async def _wait(self, ask: Ask) -> Worker:
        """Waits for a worker that is about to serve; raises if that is in vain."""
        loop = asyncio.get_running_loop()
        if ask.patience_ends is None:
            ask.patience_ends = loop.time() + self._config.wait_for_worker_seconds
        while True:
            candidates = matching(self._registry.workers.values(), ask.selector)
            patience = ask.patience_ends - loop.time()
            hopeless = not any(worker.may_come_back for worker in candidates)
            if hopeless or patience <= 0 or _is_overload(ask.failure):
                self.counters.failures += 1
                raise ask.failure or Unavailable(_nobody_serves(candidates))
            future: asyncio.Future[None] = loop.create_future()
            self._waiting.add(future)
            try:
                await asyncio.wait((future,), timeout=patience)
            finally:
                self._waiting.discard(future)
            worker = choose(self._registry.workers.values(), ask.selector, ask.tried)
            if worker is not None:
                return worker

    def _failed(self, ask: Ask, failure: Failure) -> None:
        """Raises the failure if the ask may not be repeated."""
        if failure.code is not grpc.StatusCode.UNAVAILABLE and not _is_overload(failure):
            self.counters.failures += 1
            raise failure
        if not _is_overload(ask.failure):
            ask.failure = failure
        if ask.attempts >= self._config.attempts:
            self.counters.failures += 1
            raise ask.failure or failure
        self.counters.retries += 1

    def _examine(self, connection: Connection, failure: Failure) -> Failure:
        """Takes a worker whose connection broke out of the choice before its health stream does."""
        if failure.code is not grpc.StatusCode.UNAVAILABLE or failure.details is not None:
            return failure
        if self._connections.get(connection.name) is connection:
            self._registry.down(connection.name, failure.message)
            connection.open()
        return Failure.of_error(Unavailable(f"worker {connection.name}: {failure.message}"))


def _is_overload(failure: Failure | None) -> bool:
    """A full worker; one that does not say when to retry has met a message too large for all."""
    if failure is None or failure.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return False
    return failure.retry_after is not None


def _nobody_serves(candidates: list[Worker]) -> str:
    states = (f"{w.name} {w.state.name.lower()}: {w.reason}" for w in candidates[:8])
    return f"no worker serves now ({'; '.join(states)}); try again later"
