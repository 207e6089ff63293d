"""GatewayService on the wire: messages in, messages out; what happens between is in dispatch.py."""

import itertools
import secrets
import time
from collections.abc import Awaitable
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from ...protos import ensemble_pb2, gateway_pb2, gateway_pb2_grpc, generation_pb2
from ...worker.errors import ConclaveError, InvalidRequest
from ..routing.registry import Registry, Worker, WorkerState
from ..routing.router import ANY, Selector
from ..status import Context, Failure, abort
from .dispatch import Ask, Dispatcher

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

_process = secrets.token_hex(6)
_numbers = itertools.count(1)

Answer = TypeVar("Answer")
Enveloped = (
    gateway_pb2.GatewayGenerateRequest
    | gateway_pb2.CompleteRequest
    | gateway_pb2.GatewayScoreRequest
)


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """The five calls of conclave.v1.GatewayService."""

    def __init__(self, fleet: str, registry: Registry, dispatcher: Dispatcher) -> None:
        self._fleet = fleet
        self._registry = registry
        self._dispatcher = dispatcher
        self._started = time.monotonic()

    async def Generate(self, request: gateway_pb2.GatewayGenerateRequest, context: Context) -> None:
        """Answers a prompt, event by event."""
        ask = await _open(request, context)
        await _answer(self._dispatcher.stream(ask, request.request, context.write), context)

    async def Complete(
        self, request: gateway_pb2.CompleteRequest, context: Context
    ) -> generation_pb2.CompleteResponse:
        """Answers a prompt in one message."""
        ask = await _open(request, context)
        return await _answer(self._dispatcher.complete(ask, request.request), context)

    async def Score(
        self, request: gateway_pb2.GatewayScoreRequest, context: Context
    ) -> generation_pb2.ScoreResponse:
        """Log-likelihoods of given continuations."""
        ask = await _open(request, context)
        return await _answer(self._dispatcher.score(ask, request.request), context)

    async def ListWorkers(
        self, request: gateway_pb2.ListWorkersRequest, context: Context
    ) -> gateway_pb2.ListWorkersResponse:
        """Every known worker that fits; an empty list is an answer, not an error."""
        selector = _selector(request.selector) if request.HasField("selector") else ANY
        workers = [w for w in self._registry.workers.values() if selector.matches(w)]
        return gateway_pb2.ListWorkersResponse(workers=map(_info, workers))

    async def GetFleet(
        self, request: gateway_pb2.GetFleetRequest, context: Context
    ) -> gateway_pb2.GetFleetResponse:
        """The fleet as a whole."""
        workers = self._registry.workers.values()
        counters = self._dispatcher.counters
        return gateway_pb2.GetFleetResponse(
            name=self._fleet,
            conclave_version=_version(),
            desired_workers=len(workers),
            serving_workers=sum(w.state is WorkerState.SERVING for w in workers),
            models=sorted({w.model for w in workers if w.model}),
            requests=counters.requests,
            retries=counters.retries,
            failures=counters.failures,
            uptime_seconds=time.monotonic() - self._started,
        )


async def _open(envelope: Enveloped, context: Context) -> Ask:
    if not envelope.HasField("request"):
        await abort(context, InvalidRequest.of("request", "is missing"))
    if not envelope.request.request_id:
        envelope.request.request_id = f"{_process}-{next(_numbers)}"
    selector = _selector(envelope.selector) if envelope.HasField("selector") else ANY
    return Ask(selector, context.time_remaining)


async def _answer(work: Awaitable[Answer], context: Context) -> Answer:
    try:
        return await work
    except (Failure, ConclaveError) as error:
        await abort(context, error)


def _selector(message: ensemble_pb2.WorkerSelector) -> Selector:
    return Selector(frozenset(message.names), message.model, dict(message.labels))


def _info(worker: Worker) -> gateway_pb2.WorkerInfo:
    return gateway_pb2.WorkerInfo(
        name=worker.name,
        state=gateway_pb2.WorkerState.Name(worker.state),
        address=worker.address,
        model=worker.model,
        labels=worker.labels,
        incarnation=worker.incarnation,
        device=worker.device,
        open_requests=worker.open_requests,
        served_requests=worker.served_requests,
        restarts=worker.restarts,
        reason=worker.reason,
        process=worker.process,
    )


def _version() -> str:
    try:
        return version("conclave-llm")
    except PackageNotFoundError:
        return "unknown"
