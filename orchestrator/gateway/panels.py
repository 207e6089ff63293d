"""From a caller's ensemble to a run: preset, check, width under load, seats, strategy."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...protos import gateway_pb2
from ...protos.ensemble_pb2 import MEMBER_STATE_CANCELLED, EnsembleSpec
from ...protos.generation_pb2 import (
    CompleteResponse,
    GenerateRequest,
    GenerateResponse,
    Output,
)
from ...worker.errors import InvalidRequest
from ..ensemble.panel import seat
from ..ensemble.spec import Spec, read_spec
from ..ensemble.strategies import start
from ..routing.budget import Budget
from ..routing.first_tokens import FirstTokens
from ..routing.registry import Worker
from .admission import Ask
from .dispatch import Dispatcher
from .ensembles import EnsembleRun
from .member_call import MemberCall
from .relay import Write
from .stepped import SteppedRun

HEDGE_RESERVE = 16.0
UNOBSERVED_SECONDS = 1.0
"""When to hedge before enough first tokens were seen."""

Envelope = gateway_pb2.GatewayGenerateRequest | gateway_pb2.CompleteRequest


class Panels:
    """Runs ensembles; lives on the gateway's loop.

    Args:
        dispatcher: brings calls to workers.
        presets: specs by name.
        hedge_share: hedges for each hedged ask, on average.
    """

    def __init__(
        self, dispatcher: Dispatcher, presets: Mapping[str, EnsembleSpec], hedge_share: float
    ) -> None:
        self.presets = presets
        self.hedges = 0
        self._dispatcher = dispatcher
        self._budget = Budget(hedge_share, HEDGE_RESERVE)
        self._first_tokens = FirstTokens()

    def wanted(self, envelope: Envelope) -> EnsembleSpec | None:
        """The spec of an envelope, its own or a preset's. Raises InvalidRequest."""
        match envelope.WhichOneof("ensemble_form"):
            case "ensemble":
                return envelope.ensemble
            case "preset":
                return self._preset(envelope.preset)
        return None

    async def stream(
        self,
        message: EnsembleSpec,
        ask: Ask,
        request: GenerateRequest,
        write: Write,
        unary: bool = False,
    ) -> None:
        """An ensemble's answer. Raises what the caller is to be told if nothing was written."""
        spec = read_spec(message, request, ask.wish.selector)
        asked_width = len(spec.members)
        spec = shrink(spec, spec.width_at(self._dispatcher.admission.load))
        workers = self._dispatcher.registry.workers.values()
        seats = seat(workers, spec.members, ask.wish.tokens)
        seed = _seed(message, request)
        if spec.strategy == "hedge":
            self._budget.earn()
        kind = SteppedRun if spec.stepped else EnsembleRun
        run = kind(
            self._dispatcher, spec, seats, asked_width, request, ask, write, self._budget, unary
        )
        strategy = start(spec, request, seed, lambda fraction: self._late(seats[0], fraction))
        try:
            await run.run(strategy)
        finally:
            self._note(run)

    async def complete(
        self, message: EnsembleSpec, ask: Ask, request: GenerateRequest
    ) -> CompleteResponse:
        """The same in one message."""
        gathered = Gathered()
        await self.stream(message, ask, request, gathered.take, unary=True)
        return gathered.response

    def _preset(self, name: str) -> EnsembleSpec:
        if name not in self.presets:
            known = ", ".join(sorted(self.presets)) or "none"
            raise InvalidRequest.of("preset", f"{name!r} is not in the fleet file; known: {known}")
        return self.presets[name]

    def _note(self, run: EnsembleRun) -> None:
        self.hedges += sum(call.role == "hedge" for call in run.calls.values())
        if run.spec.strategy not in ("single", "hedge"):
            return
        spoke = [call for call in run.calls.values() if call.first_token is not None]
        for call in spoke:
            assert call.first_token is not None
            self._first_tokens.note(call.worker_name, call.first_token)
        if len(spoke) == 1:
            self._compare(spoke[0], run.calls.values())

    def _compare(self, winner: MemberCall, calls: Iterable[MemberCall]) -> None:
        """Who was cancelled without a word is slower than who spoke; it would probably have taken
        as long again."""
        assert winner.first_token is not None
        for call in calls:
            if call.state == MEMBER_STATE_CANCELLED and call.total > winner.first_token:
                ratio = winner.first_token / (2 * call.total)
                self._dispatcher.registry.outrun(call.worker_name, winner.worker_name, ratio)

    def _late(self, first: Worker | None, fraction: float) -> float:
        """Seconds after which a first token is late, by the workers with the first one's model."""
        workers = self._dispatcher.registry.workers.values()
        alike = [w.name for w in workers if first is None or w.model == first.model]
        usual = self._first_tokens.usual(alike, fraction)
        return UNOBSERVED_SECONDS if usual is None else usual


class Gathered:
    """Makes one message of an answer's events."""

    def __init__(self) -> None:
        self.response = CompleteResponse()
        self._output = Output()

    async def take(self, event: GenerateResponse) -> None:
        """One more event."""
        match event.WhichOneof("event"):
            case "delta":
                self._output.tokens.extend(event.delta.tokens)
            case "finished":
                self._finish(event)

    def _finish(self, event: GenerateResponse) -> None:
        finished, response = event.finished, self.response
        self._output.text = "".join(token.text for token in self._output.tokens)
        self._output.end.CopyFrom(finished.outputs[0])
        response.outputs.append(self._output)
        response.request_id = event.request_id
        response.usage.CopyFrom(finished.usage)
        response.timings.CopyFrom(finished.timings)
        response.worker, response.model = finished.worker, finished.model
        response.resumes = finished.resumes
        response.ensemble.CopyFrom(finished.ensemble)


def shrink(spec: Spec, width: int) -> Spec:
    """The ensemble with so many members; a mixture keeps the one that writes."""
    if width >= len(spec.members):
        return spec
    kept = list(range(width))
    message = EnsembleSpec()
    message.CopyFrom(spec.message)
    if spec.strategy == "mixture":
        asked = message.mixture
        writer = asked.aggregator if asked.HasField("aggregator") else len(spec.members) - 1
        if writer >= width:
            kept[-1] = writer
        asked.aggregator = kept.index(writer)
    members = tuple(spec.members[place] for place in kept)
    quorum = spec.quorum if spec.hasty else width // 2 + 1
    if spec.strategy in ("single", "hedge", "cascade"):
        quorum = 1
    return replace(spec, message=message, members=members, quorum=quorum)


def _seed(message: EnsembleSpec, request: GenerateRequest) -> int:
    """The seed of the ensemble's own draws; the request gets one too if it has none."""
    sampling = request.sampling
    if not sampling.HasField("seed"):
        own = message.HasField("seed")
        sampling.seed = message.seed if own else random.getrandbits(63)
    return message.seed if message.HasField("seed") else sampling.seed
