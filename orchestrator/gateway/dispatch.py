"""The life of one ask inside the gateway: a worker, an answer, the next worker if it fails.

An ask of which its caller has seen nothing may be repeated on any worker that fits. A stream that
has begun may go on with a worker of the same weights, and with no other. Nothing here formats or
logs on the way of a good answer: this is the path whose cost is counted.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
import grpc.aio

from ...protos.generation_pb2 import (
    CompleteResponse,
    GenerateRequest,
    ScoreRequest,
    ScoreResponse,
    Usage,
)
from ...protos.worker_pb2 import ConverseRequest, Reply
from ...worker.errors import ConclaveError, Unavailable
from ..config import GatewayConfig
from ..lines.connection import Connection
from ..lines.conversation import Pending
from ..lines.step_line import StepLine
from ..routing.budget import Budget
from ..routing.prefix import PrefixIndex
from ..routing.registry import Registry, Worker
from ..routing.sessions import Sessions
from ..status import Failure
from .admission import Admission, Ask
from .pacer import Pacer
from .relay import Relay, Write, may_move


@dataclass(slots=True)
class Counters:
    """Since the gateway's start."""

    requests: int = 0
    retries: int = 0
    resumes: int = 0
    failures: int = 0


class Dispatcher:
    """Brings asks to workers. Lives on the gateway's event loop."""

    def __init__(
        self, registry: Registry, connections: Mapping[str, Connection], config: GatewayConfig
    ) -> None:
        self.counters = Counters()
        self.registry = registry
        self.admission = Admission(registry, config)
        self._connections = connections
        self._config = config
        self._retries = Budget(config.retry_share, config.retry_reserve)
        self._sessions = Sessions()
        self._prefixes = PrefixIndex()
        self._pacer = Pacer()

    async def complete(self, ask: Ask, request: GenerateRequest) -> CompleteResponse:
        """A whole answer. Raises Failure or a typed error."""
        name = request.request_id
        completion = (await self._answer(ask, ConverseRequest(complete=request))).completion
        completion.request_id = name  # a repeated ask has another one at its worker
        return completion

    async def score(self, ask: Ask, request: ScoreRequest) -> ScoreResponse:
        """Log-likelihoods. Raises Failure or a typed error."""
        return (await self._answer(ask, ConverseRequest(score=request))).scores

    async def stream(self, ask: Ask, request: GenerateRequest, write: Write) -> None:
        """A stream of events. Raises Failure or a typed error if nothing has been written."""
        self._count()
        relay = Relay(request, write, self._pacer)
        while True:
            try:
                worker = await self._place(ask)
            except (Failure, ConclaveError) as error:
                if not relay.begun:
                    raise
                await relay.fail(_nobody_goes_on(ask, error))
                return
            failure = await self._run(ask, worker, relay)
            if failure is None:
                return
            if relay.begun:
                if not self._may_go_on(ask, worker, relay, failure):
                    self.counters.failures += 1
                    await relay.fail(failure)
                    return
                self.counters.resumes += 1
            else:
                self._repeat(ask, failure)

    async def step(self, ask: Ask) -> tuple[Worker, StepLine]:
        """A line to one answer to be stepped; `end_step` gives it back."""
        self._count()
        worker = await self._place(ask)
        return worker, self._connections[worker.name].step(ask.remaining())

    def end_step(self, ask: Ask, worker: Worker, line: StepLine, failure: Failure | None) -> None:
        """The answer has ended, or the line has failed."""
        line.close()
        connection = self._connections.get(worker.name)
        if failure is None:
            self._answered(worker)
        elif connection is not None:
            self._examine(ask, worker, connection, failure)
        self.admission.release(ask, worker)

    def fleet_changed(self) -> None:
        """A worker has changed: the waiting asks look again."""
        self.admission.changed()

    async def _run(self, ask: Ask, worker: Worker, relay: Relay) -> Failure | None:
        """One worker's part of a stream; why it broke, if it did."""
        connection = self._connections[worker.name]
        pending = connection.ask(relay.message(), ask.remaining())
        try:
            failure = await relay.run(pending)
            if failure is not None:
                return self._examine(ask, worker, connection, failure)
            self._answered(worker)
            return None
        finally:
            self._leave(ask, worker, pending, relay.usage)

    async def _answer(self, ask: Ask, message: ConverseRequest) -> Reply:
        """The one reply to a message."""
        self._count()
        while True:
            worker = await self._place(ask)
            connection = self._connections[worker.name]
            pending = connection.ask(message, ask.remaining())
            usage = None
            try:
                reply = await pending.next()
                self._answered(worker)
                usage = reply.completion.usage
                return reply
            except Failure as error:
                failure = self._examine(ask, worker, connection, error)
            finally:
                self._leave(ask, worker, pending, usage)
            self._repeat(ask, failure)
            if message.HasField("complete"):
                message.complete.request_id += "~"

    async def _place(self, ask: Ask) -> Worker:
        if not self._config.prefix_affinity:
            ask.prompt = b""
        if ask.session or ask.prompt:
            ask.wish.known = self._prefixes.find(ask.prompt)
            warm = (self._sessions.find(ask.session), ask.wish.known.worker)
            ask.wish.warm = tuple(name for name in warm if name)
        try:
            worker = await self.admission.place(ask)
        except (Failure, ConclaveError):
            self.counters.failures += 1
            raise
        if ask.session:
            self._sessions.note(ask.session, worker.name)
        if ask.prompt:
            self._prefixes.note(ask.prompt, worker.name)
        return worker

    def _count(self) -> None:
        self.counters.requests += 1
        self._retries.earn()

    def _answered(self, worker: Worker) -> None:
        worker.served_requests += 1
        worker.breaker.success()

    def _leave(self, ask: Ask, worker: Worker, pending: Pending, usage: Usage | None) -> None:
        """The one way out of a worker: by an end, which has a usage, a failure or a cancel."""
        pending.close()
        worker.breaker.give_up()
        if usage is not None and worker.name == ask.wish.known.worker:
            self._prefixes.learn(ask.wish.known, usage.cached_tokens)
        answered = None if usage is None else usage.completion_tokens
        self.admission.release(ask, worker, answered=answered)

    def _repeat(self, ask: Ask, failure: Failure) -> None:
        """Raises the failure if the ask may not be repeated."""
        if not may_move(failure) and not failure.is_overload:
            self.counters.failures += 1
            raise failure
        if ask.failure is None or not ask.failure.is_overload:
            ask.failure = failure
        if ask.attempts >= self._config.attempts or not self._retries.spend():
            self.counters.failures += 1
            raise ask.failure or failure
        self.counters.retries += 1

    def _may_go_on(self, ask: Ask, worker: Worker, relay: Relay, failure: Failure) -> bool:
        """Whether a stream that has begun may move, and what its next worker must be."""
        if not (ask.resume and may_move(failure) and worker.weights):
            return False
        if relay.progressed:
            ask.attempts = 0
        ask.wish.weights = worker.weights
        ask.failure = failure
        return ask.attempts < self._config.attempts and self._retries.spend()

    def _examine(
        self, ask: Ask, worker: Worker, connection: Connection, failure: Failure
    ) -> Failure:
        """What a failure says of its worker: a broken line takes it out of the choice at once."""
        if failure.code in _WORKERS_FAULT:
            worker.breaker.failure(asyncio.get_running_loop().time(), ask.begun)
        elif not failure.is_overload:
            worker.breaker.success()
        if failure.code is not grpc.StatusCode.UNAVAILABLE or failure.details is not None:
            return failure
        if self._connections.get(connection.name) is connection:
            self.registry.down(connection.name, failure.message)
            connection.open()
        return Failure.of_error(Unavailable(f"worker {connection.name}: {failure.message}"))


_WORKERS_FAULT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


def _nobody_goes_on(ask: Ask, error: Failure | ConclaveError) -> Failure:
    """What to tell the caller of a stream that nobody can go on with."""
    broken = ask.failure.message if ask.failure else "its worker failed"
    reason = error.message if isinstance(error, Failure) else str(error)
    return Failure.of_error(
        Unavailable(f"{broken}; no other worker with the same weights can go on: {reason}")
    )
