"""Who did what in an ensemble, as a caller gets it. Pure."""

from dataclasses import dataclass
from typing import Literal

from ...protos import ensemble_pb2, generation_pb2

MemberState = Literal["asked", "answered", "left_behind", "failed", "cancelled"]

_STATES: dict[int, MemberState] = {
    ensemble_pb2.MEMBER_STATE_ASKED: "asked",
    ensemble_pb2.MEMBER_STATE_ANSWERED: "answered",
    ensemble_pb2.MEMBER_STATE_LEFT_BEHIND: "left_behind",
    ensemble_pb2.MEMBER_STATE_FAILED: "failed",
    ensemble_pb2.MEMBER_STATE_CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class MemberReport:
    """One call to one member; the fields are explained in protos/ensemble.proto."""

    worker: str
    model: str
    state: MemberState
    member: int
    role: str
    prompt_tokens: int
    completion_tokens: int
    first_token: float | None
    total: float
    mean_logprob: float | None
    score: float | None
    answer: str | None
    agreed: bool
    cost: float
    reason: str
    text: str
    dissents: int
    rejoined: int


@dataclass(frozen=True, slots=True)
class Ensemble:
    """How an ensemble came to its answer."""

    strategy: str
    members: tuple[MemberReport, ...]
    asked_width: int
    width: int
    total_tokens: int
    cost: float
    agreement: float | None


def ensemble_of(
    message: generation_pb2.Finished | generation_pb2.CompleteResponse,
) -> Ensemble | None:
    """The report that came with an answer, if it is an ensemble's."""
    if not message.HasField("ensemble"):
        return None
    report = message.ensemble
    return Ensemble(
        strategy=report.strategy,
        members=tuple(map(_member, report.members)),
        asked_width=report.asked_width,
        width=report.width,
        total_tokens=report.total_tokens,
        cost=report.cost,
        agreement=report.agreement if report.HasField("agreement") else None,
    )


def _member(report: ensemble_pb2.MemberReport) -> MemberReport:
    return MemberReport(
        worker=report.worker,
        model=report.model,
        state=_STATES[report.state],
        member=report.member,
        role=report.role,
        prompt_tokens=report.prompt_tokens,
        completion_tokens=report.completion_tokens,
        first_token=report.first_token if report.HasField("first_token") else None,
        total=report.total,
        mean_logprob=report.mean_logprob if report.HasField("mean_logprob") else None,
        score=report.score if report.HasField("score") else None,
        answer=report.answer if report.HasField("answer") else None,
        agreed=report.agreed,
        cost=report.cost,
        reason=report.reason,
        text=report.text,
        dissents=report.dissents,
        rejoined=report.rejoined,
    )
