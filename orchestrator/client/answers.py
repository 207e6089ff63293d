"""What a caller gets back: plain frozen values for the protocol's messages. Pure.

A `Collector` gathers the events of one stream into a `Completion`; the sync and the async client
drive the same one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ...protos import gateway_pb2, generation_pb2
from ...worker.precision import Precision
from ..precision import precision_of
from ..routing.registry import WorkerState
from ..status import error_of_event
from .reports import Ensemble, ensemble_of

FinishReason = Literal["stop", "length", "unspecified"]

_REASONS: dict[int, FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have stood here; `logprob` is a natural logarithm."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Vote:
    """One member's word on a token; `logprob` is the token's under that member alone."""

    member: int
    logprob: float
    agreed: bool


@dataclass(frozen=True, slots=True)
class Token:
    """One token; `logprob` and `rank` (1 is the likeliest) are None unless asked for."""

    id: int
    text: str
    logprob: float | None = None
    rank: int | None = None
    candidates: tuple[Candidate, ...] = ()
    votes: tuple[Vote, ...] = ()
    """Who took part in it, in `fuse` and `mixture_sample`."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of answer number `output`."""

    output: int
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """One of the n answers; `matched` is the stop text or stop token id that ended it."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    matched: str | int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted by the worker."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the request's arrival at the worker."""

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; `text`, `tokens` and the rest of the first output are at hand directly."""

    request_id: str
    outputs: tuple[Output, ...]
    usage: Usage
    timings: Timings
    worker: str
    model: str
    prompt_tokens: tuple[Token, ...] = ()
    """With log-probabilities, if `prompt_logprobs` was asked."""
    ensemble: Ensemble | None = None
    """Who did what, if several workers made it."""
    resumes: int = 0
    """How often it went on with another worker."""

    @property
    def text(self) -> str:
        """Of the first output."""
        return self.outputs[0].text

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Of the first output."""
        return self.outputs[0].tokens

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first output."""
        return self.outputs[0].finish_reason


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of one continuation, natural logarithm, summed over `scored_tokens`."""

    logprob: float
    scored_tokens: int
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the gateway sees it."""

    name: str
    state: WorkerState
    address: str
    model: str
    labels: Mapping[str, str]
    incarnation: str
    device: str
    open_requests: int
    served_requests: int
    restarts: int
    reason: str
    process: int
    outstanding_tokens: int
    """Prompt and answer tokens that it has still to compute, by the gateway's estimate."""
    tokens_per_second: float
    broken: bool
    """Left alone for a while after failures in a row."""
    precision: Precision | None
    """What is left of its weights; None until it has said so."""


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The fleet as a whole; the counts are the gateway's since its start."""

    name: str
    conclave_version: str
    desired_workers: int
    serving_workers: int
    models: tuple[str, ...]
    requests: int
    retries: int
    failures: int
    resumes: int
    hedges: int
    rejections: int
    queued_requests: int
    presets: tuple[str, ...]
    uptime_seconds: float


class Collector:
    """Gathers the events of one stream."""

    def __init__(self) -> None:
        self.completion: Completion | None = None
        """The whole answer, once the stream has ended well."""
        self._tokens: dict[int, list[Token]] = {}
        self._prompt_tokens: tuple[Token, ...] = ()

    def take(self, event: generation_pb2.GenerateResponse) -> Delta | None:
        """Takes one event in; returns its new tokens. Raises the error that a `failed` tells."""
        kind = event.WhichOneof("event")
        if kind == "failed":
            raise error_of_event(event.failed.error)
        if kind == "finished":
            self._finish(event.request_id, event.finished)
            return None
        if kind == "member":
            return None  # it stands in the ensemble's report as well
        delta = event.delta
        tokens = _tokens(delta.tokens)
        self._tokens.setdefault(delta.output_index, []).extend(tokens)
        if delta.prompt_tokens:
            self._prompt_tokens = _tokens(delta.prompt_tokens)
        return Delta(delta.output_index, "".join([token.text for token in tokens]), tokens)

    def _finish(self, request_id: str, finished: generation_pb2.Finished) -> None:
        outputs = []
        for end in finished.outputs:
            tokens = tuple(self._tokens.get(end.output_index, ()))
            outputs.append(_output("".join(token.text for token in tokens), tokens, end))
        self.completion = Completion(
            request_id=request_id,
            outputs=tuple(outputs),
            usage=_usage(finished.usage),
            timings=_timings(finished.timings),
            worker=finished.worker,
            model=finished.model,
            prompt_tokens=self._prompt_tokens,
            ensemble=ensemble_of(finished),
            resumes=finished.resumes,
        )


def completion_of(response: generation_pb2.CompleteResponse) -> Completion:
    """A whole answer that came in one message."""
    outputs = [_output(o.text, _tokens(o.tokens), o.end) for o in response.outputs]
    return Completion(
        request_id=response.request_id,
        outputs=tuple(outputs),
        usage=_usage(response.usage),
        timings=_timings(response.timings),
        worker=response.worker,
        model=response.model,
        prompt_tokens=_tokens(response.prompt_tokens),
        ensemble=ensemble_of(response),
        resumes=response.resumes,
    )


def scores_of(response: generation_pb2.ScoreResponse) -> tuple[Score, ...]:
    """One score a continuation."""
    return tuple(Score(s.logprob, s.scored_tokens, _tokens(s.tokens)) for s in response.scores)


def workers_of(response: gateway_pb2.ListWorkersResponse) -> tuple[WorkerStatus, ...]:
    """Every listed worker."""
    return tuple(
        WorkerStatus(
            name=info.name,
            state=WorkerState(info.state),
            address=info.address,
            model=info.model,
            labels=dict(info.labels),
            incarnation=info.incarnation,
            device=info.device,
            open_requests=info.open_requests,
            served_requests=info.served_requests,
            restarts=info.restarts,
            reason=info.reason,
            process=info.process,
            outstanding_tokens=info.outstanding_tokens,
            tokens_per_second=info.tokens_per_second,
            broken=info.broken,
            precision=precision_of(info),
        )
        for info in response.workers
    )


def fleet_of(response: gateway_pb2.GetFleetResponse) -> FleetStatus:
    """The fleet as a whole."""
    return FleetStatus(
        name=response.name,
        conclave_version=response.conclave_version,
        desired_workers=response.desired_workers,
        serving_workers=response.serving_workers,
        models=tuple(response.models),
        requests=response.requests,
        retries=response.retries,
        failures=response.failures,
        resumes=response.resumes,
        hedges=response.hedges,
        rejections=response.rejections,
        queued_requests=response.queued_requests,
        presets=tuple(response.presets),
        uptime_seconds=response.uptime_seconds,
    )


def _output(text: str, tokens: tuple[Token, ...], end: generation_pb2.OutputEnd) -> Output:
    matched: str | int | None = None
    if end.WhichOneof("matched") == "stop_text":
        matched = end.stop_text
    elif end.WhichOneof("matched") == "stop_token_id":
        matched = end.stop_token_id
    return Output(text, tokens, _REASONS.get(end.reason, "unspecified"), matched)


def _usage(usage: generation_pb2.Usage) -> Usage:
    return Usage(
        usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.preemptions
    )


def _timings(timings: generation_pb2.Timings) -> Timings:
    return Timings(timings.queued, timings.first_token, timings.total)


def _tokens(tokens: Iterable[generation_pb2.Token]) -> tuple[Token, ...]:
    return tuple([_token(token) for token in tokens])


def _token(token: generation_pb2.Token) -> Token:
    return Token(
        token.id,
        token.text,
        token.logprob if token.HasField("logprob") else None,
        token.rank if token.HasField("rank") else None,
        tuple([Candidate(c.id, c.text, c.logprob) for c in token.candidates]),
        tuple([Vote(v.member, v.logprob, v.agreed) for v in token.votes]),
    )
