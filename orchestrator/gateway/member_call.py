"""One call to one member of an ensemble, and what there is to report of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...protos import ensemble_pb2
from ...protos.ensemble_pb2 import MemberReport
from ...protos.generation_pb2 import Finished, GenerateResponse, Token
from ..ensemble.calls import Answer, Mark
from ..routing.registry import Worker


@dataclass(slots=True, eq=False)
class MemberCall:
    """A call under way, and after its end."""

    member: int
    """Its place in the spec."""
    role: str
    worker: Worker | None = None
    """Who was meant to answer; the one that did stands in `finished`."""
    state: "ensemble_pb2.MemberState" = ensemble_pb2.MEMBER_STATE_ASKED
    reason: str = ""
    error: Exception | None = None
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    total: float = 0.0
    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reserved: int = 0
    """Tokens taken from the allowance."""

    def hear(self, event: GenerateResponse) -> None:
        """Take an event of its stream."""
        if event.HasField("finished"):
            self.finished = event.finished
            self.prompt_tokens = event.finished.usage.prompt_tokens
            self.completion_tokens = event.finished.usage.completion_tokens
            return
        if self.first_token is None:
            self.first_token = time.monotonic() - self.started
        self.tokens.extend(event.delta.tokens)
        self.completion_tokens = len(self.tokens)

    def end(self, state: "ensemble_pb2.MemberState", reason: str = "") -> None:
        """It is over."""
        self.state, self.reason = state, reason
        self.total = time.monotonic() - self.started

    @property
    def price(self) -> float:
        """Cost of 1,000 tokens."""
        return 1.0 if self.worker is None else self.worker.cost

    @property
    def cost(self) -> float:
        """What it has cost so far."""
        return (self.prompt_tokens + self.completion_tokens) * self.price / 1000

    @property
    def mean_logprob(self) -> float | None:
        """A token's mean log-probability, if it was asked for."""
        return mean_logprob(self.tokens)

    def answer(self) -> Answer:
        """The whole answer."""
        assert self.finished is not None
        return Answer(tuple(self.tokens), self.finished.outputs[0], self.mean_logprob or 0.0)

    def report(self, mark: Mark | None, with_text: bool) -> MemberReport:
        """What the caller is told of it."""
        report = MemberReport(
            worker=self.worker_name,
            model=self.worker.model if self.worker else "",
            state=self.state,
            member=self.member,
            role=self.role,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            first_token=self.first_token,
            total=self.total,
            mean_logprob=self.mean_logprob,
            cost=self.cost,
            reason=self.reason,
        )
        if with_text:
            report.text = "".join(token.text for token in self.tokens)
        if mark is not None:
            report.agreed = mark.agreed
            report.dissents, report.rejoined = mark.dissents, mark.rejoined
            if mark.score is not None:
                report.score = mark.score
            if mark.answer is not None:
                report.answer = mark.answer
            report.reason = report.reason or mark.failed
        return report

    @property
    def worker_name(self) -> str:
        """Who answers, or was meant to."""
        if self.finished is not None and self.finished.worker:
            return self.finished.worker
        return self.worker.name if self.worker else ""


def mean_logprob(tokens: Sequence[Token]) -> float | None:
    """Of tokens with log-probabilities; None if they have none."""
    known = [token.logprob for token in tokens if token.HasField("logprob")]
    return sum(known) / len(known) if known else None
