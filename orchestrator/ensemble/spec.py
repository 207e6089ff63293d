"""An ensemble as a caller asked for it, checked. Pure.

The meaning and the default of every field stand in protos/ensemble.proto. Nothing is silently
dropped: what cannot be honoured is refused by its name.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from ...protos import ensemble_pb2
from ...protos.ensemble_pb2 import EnsembleSpec
from ...protos.generation_pb2 import GenerateRequest
from ...worker.errors import InvalidRequest, Violation
from ..routing.router import ANY, Selector

MOST_MEMBERS = 16
MOST_SAMPLES = 64
USUAL_COUNT = {"single": 1, "hedge": 2, "mixture_sample": 2, "cascade": 2}
"""Members if none are named; 3 for the other strategies."""
FEWEST = {"single": 1, "vote": 1, "best_of": 1}
"""Members that a strategy needs; 2 for the others."""
STEPPED = ("fuse", "mixture_sample")
STEP_SECONDS = 2.0
"""How long token-level strategies wait for a member, by default."""


@dataclass(frozen=True, slots=True)
class MemberWish:
    """One place of the ensemble."""

    selector: Selector = ANY
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Spec:
    """A checked ensemble."""

    strategy: str
    message: EnsembleSpec
    """Where the strategy's own fields stand."""
    members: tuple[MemberWish, ...]
    quorum: int
    hasty: bool
    """Whether the caller set the quorum."""
    timeout: float | None
    """Seconds for a member."""

    @property
    def stepped(self) -> bool:
        """Whether it works token by token."""
        return self.strategy in STEPPED

    def width_at(self, load: float) -> int:
        """Members under that load (0 to 1, or more): its declared curve, never below the quorum."""
        width = len(self.members)
        for step in self.message.width:
            if load >= step.load:
                width = min(width, step.members)
        return max(width, FEWEST.get(self.strategy, 2), self.quorum if self.hasty else 1)


def read_spec(message: EnsembleSpec, request: GenerateRequest, selector: Selector) -> Spec:
    """Check a spec together with its request.

    Args:
        message: the spec.
        request: what the ensemble shall answer.
        selector: the request's, for members that are not named.

    Raises:
        InvalidRequest: with every field at fault.
    """
    strategy = message.WhichOneof("strategy")
    if strategy is None:
        raise InvalidRequest.of("ensemble.strategy", "is missing; set one, such as `vote`")
    found = _Violations()
    members = _members(message, strategy, selector, found)
    majority = len(members) // 2 + 1
    quorum = message.quorum if message.HasField("quorum") else majority
    if strategy in ("single", "hedge", "cascade"):
        quorum = 1
        found.add(message.HasField("quorum"), "quorum", f"has no meaning for {strategy}")
    found.add(not 1 <= quorum <= len(members), "quorum", f"must be 1 to {len(members)}")
    _check_limits(message, found)
    _check_strategy(message, strategy, len(members), found)
    _check_request(strategy, message, request, found)
    found.raise_any()
    timeout = message.member_timeout_seconds if message.HasField("member_timeout_seconds") else None
    if timeout is None and strategy in STEPPED:
        timeout = STEP_SECONDS
    return Spec(strategy, message, members, quorum, message.HasField("quorum"), timeout)


class _Violations:
    """What is wrong so far."""

    def __init__(self) -> None:
        self._found: list[Violation] = []

    def add(self, wrong: bool, field: str, description: str, under: str = "ensemble.") -> None:
        if wrong:
            self._found.append(Violation(under + field, description))

    def raise_any(self) -> None:
        if self._found:
            raise InvalidRequest(self._found)


def _members(
    message: EnsembleSpec, strategy: str, selector: Selector, found: _Violations
) -> tuple[MemberWish, ...]:
    named, counted = list(message.members), message.HasField("count")
    found.add(bool(named) and counted, "count", "is for members that are not named")
    count = message.count if counted else USUAL_COUNT.get(strategy, 3)
    width = len(named) or count
    fewest = FEWEST.get(strategy, 2)
    field = "members" if named else "count"
    found.add(
        not fewest <= width <= MOST_MEMBERS, field, f"must be {fewest} to {MOST_MEMBERS} members"
    )
    found.add(
        strategy == "cascade" and not named, "members", "must be named, in order of their power"
    )
    wishes = []
    for index, member in enumerate(named):
        weight = member.weight if member.HasField("weight") else 1.0
        wrong = not (math.isfinite(weight) and weight > 0)
        found.add(wrong, f"members[{index}].weight", "must be a positive number")
        wishes.append(MemberWish(_selector(member, selector), weight))
    return tuple(wishes) or (MemberWish(selector),) * min(count, MOST_MEMBERS)


def _selector(member: ensemble_pb2.Member, default: Selector) -> Selector:
    if not member.HasField("selector"):
        return default
    chosen = member.selector
    labels = dict(chosen.labels)
    return Selector(frozenset(chosen.names), chosen.model, labels, knobs=default.knobs)


def _check_limits(message: EnsembleSpec, found: _Violations) -> None:
    for field in ("member_timeout_seconds", "max_cost", "max_total_tokens"):
        value = getattr(message, field)
        wrong = message.HasField(field) and not (math.isfinite(value) and value > 0)
        found.add(wrong, field, "must be a positive number")
    loads = [step.load for step in message.width]
    found.add(loads != sorted(loads), "width", "must be in ascending order of load")
    for index, step in enumerate(message.width):
        found.add(not step.members, f"width[{index}].members", "must be at least 1")
        wrong = not (math.isfinite(step.load) and step.load >= 0)
        found.add(wrong, f"width[{index}].load", "must be 0 or more")


def _check_strategy(message: EnsembleSpec, strategy: str, width: int, found: _Violations) -> None:
    checks: dict[str, Callable[[], None]] = {
        "hedge": lambda: _check_hedge(message.hedge, found),
        "vote": lambda: _check_vote(message.vote, found),
        "best_of": lambda: _check_samples(message.best_of.samples, "best_of", found),
        "cascade": lambda: found.add(
            math.isnan(message.cascade.min_mean_logprob),
            "cascade.min_mean_logprob",
            "must be a number",
        ),
        "mixture": lambda: _check_mixture(message.mixture, width, found),
        "fuse": lambda: found.add(
            message.fuse.HasField("candidates") and not message.fuse.candidates,
            "fuse.candidates",
            "must be at least 1",
        ),
    }
    checks.get(strategy, lambda: None)()


def _check_hedge(hedge: ensemble_pb2.Hedge, found: _Violations) -> None:
    wrong = hedge.HasField("quantile") and not 0 < hedge.quantile < 1
    found.add(wrong, "hedge.quantile", "must be between 0 and 1")
    after = hedge.after_seconds
    wrong = hedge.HasField("after_seconds") and not (math.isfinite(after) and after >= 0)
    found.add(wrong, "hedge.after_seconds", "must be 0 or more")


def _check_vote(vote: ensemble_pb2.Vote, found: _Violations) -> None:
    _check_samples(vote.samples, "vote", found)
    try:
        re.compile(vote.extract)
    except re.error as error:
        found.add(True, "vote.extract", f"is not a regular expression: {error}")


def _check_samples(samples: int, strategy: str, found: _Violations) -> None:
    found.add(samples > MOST_SAMPLES, f"{strategy}.samples", f"must be at most {MOST_SAMPLES}")


def _check_mixture(mixture: ensemble_pb2.Mixture, width: int, found: _Violations) -> None:
    found.add(mixture.aggregator >= width, "mixture.aggregator", f"must be below {width}")
    if mixture.HasField("template"):
        missing = [word for word in ("{prompt}", "{drafts}") if word not in mixture.template]
        found.add(bool(missing), "mixture.template", f"must contain {' and '.join(missing)}")


def _check_request(
    strategy: str, message: EnsembleSpec, request: GenerateRequest, found: _Violations
) -> None:
    sampling = request.sampling
    found.add(sampling.n > 1, "sampling.n", "must be 1 in an ensemble", under="")
    asked = sampling.HasField("prompt_logprobs")
    found.add(asked, "sampling.prompt_logprobs", "is not told by ensembles", under="")
    found.add(bool(request.made), "made", "is not for ensembles", under="")
    if strategy == "fuse":
        penalised = sampling.HasField("repetition_penalty") and sampling.repetition_penalty != 1
        found.add(
            penalised,
            "sampling.repetition_penalty",
            "is defined on one model's logits, not on a fused distribution; "
            "use presence_penalty or frequency_penalty",
            under="",
        )
    if strategy == "mixture_sample":
        greedy = sampling.HasField("temperature") and sampling.temperature == 0
        text = "is 0, but mixture_sample draws its tokens; raise it, or use fuse"
        found.add(greedy, "sampling.temperature", text, under="")
    if strategy == "mixture":
        kind = request.prompt.WhichOneof("input")
        found.add(kind == "token_ids", "prompt", "must be text or a chat for mixture", under="")
