"""GatewayService on the wire: messages in, messages out; what happens between is in dispatch.py."""

import time
from collections.abc import Awaitable
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from ...protos import gateway_pb2, gateway_pb2_grpc, generation_pb2
from ...worker.errors import ConclaveError
from ..precision import precision_message
from ..routing.registry import Registry, Worker, WorkerState
from ..routing.router import ANY
from ..status import Context, Failure, abort
from .dispatch import Dispatcher
from .opening import open_ask, selector_of
from .panels import Panels

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

Answer = TypeVar("Answer")


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """The five calls of conclave.v1.GatewayService."""

    def __init__(
        self, fleet: str, registry: Registry, dispatcher: Dispatcher, panels: Panels
    ) -> None:
        self._fleet = fleet
        self._registry = registry
        self._dispatcher = dispatcher
        self._panels = panels
        self._started = time.monotonic()

    async def Generate(self, request: gateway_pb2.GatewayGenerateRequest, context: Context) -> None:
        """Answers a prompt, event by event."""
        await _answer(self._stream(request, context), context)

    async def Complete(
        self, request: gateway_pb2.CompleteRequest, context: Context
    ) -> generation_pb2.CompleteResponse:
        """Answers a prompt in one message."""
        return await _answer(self._complete(request, context), context)

    async def Score(
        self, request: gateway_pb2.GatewayScoreRequest, context: Context
    ) -> generation_pb2.ScoreResponse:
        """Log-likelihoods of given continuations."""
        return await _answer(self._score(request, context), context)

    async def ListWorkers(
        self, request: gateway_pb2.ListWorkersRequest, context: Context
    ) -> gateway_pb2.ListWorkersResponse:
        """Every known worker that fits; an empty list is an answer, not an error."""
        selector = selector_of(request.selector) if request.HasField("selector") else ANY
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
            resumes=counters.resumes,
            hedges=self._panels.hedges,
            presets=sorted(self._panels.presets),
            rejections=self._dispatcher.admission.rejections,
            queued_requests=self._dispatcher.admission.queued,
            uptime_seconds=time.monotonic() - self._started,
        )

    async def _stream(self, envelope: gateway_pb2.GatewayGenerateRequest, context: Context) -> None:
        ask = open_ask(envelope, context.time_remaining)
        ensemble = self._panels.wanted(envelope)
        if ensemble is None:
            await self._dispatcher.stream(ask, envelope.request, context.write)
        else:
            await self._panels.stream(ensemble, ask, envelope.request, context.write)

    async def _complete(
        self, envelope: gateway_pb2.CompleteRequest, context: Context
    ) -> generation_pb2.CompleteResponse:
        ask = open_ask(envelope, context.time_remaining)
        ensemble = self._panels.wanted(envelope)
        if ensemble is None:
            return await self._dispatcher.complete(ask, envelope.request)
        return await self._panels.complete(ensemble, ask, envelope.request)

    async def _score(
        self, envelope: gateway_pb2.GatewayScoreRequest, context: Context
    ) -> generation_pb2.ScoreResponse:
        ask = open_ask(envelope, context.time_remaining)
        return await self._dispatcher.score(ask, envelope.request)


async def _answer(work: Awaitable[Answer], context: Context) -> Answer:
    try:
        return await work
    except (Failure, ConclaveError) as error:
        await abort(context, error)


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
        outstanding_tokens=worker.outstanding_tokens,
        tokens_per_second=worker.tokens_per_second,
        broken=worker.breaker.open,
        precision=precision_message(worker.precision),
    )


def _version() -> str:
    try:
        return version("conclave-llm")
    except PackageNotFoundError:
        return "unknown"
