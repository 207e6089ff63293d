"""What both token-level strategies keep of their members: who is where in the common answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...protos.generation_pb2 import SamplingParams, Token
from ...worker.errors import InvalidRequest
from .calls import Command, Lost, Mark, Open, Stepped, View, raise_quorum
from .combining import Rules

REJOIN_SECONDS = 1.0
"""Pause before a lost member is tried again."""


@dataclass(slots=True)
class Stepper:
    """One member."""

    weight: float
    vocabulary: int = 0
    """Its tokens in all, once it is open."""
    known: int = 0
    """Tokens of the answer that it has been given."""
    step: Stepped | None = None
    """Its last word, while it waits for the next take."""
    lost: bool = True
    opened: bool = False
    """Whether it was ever there."""
    present: bool = True
    """Whether the next token waits for it."""
    dissents: int = 0
    rejoined: int = 0
    error: Exception | None = None

    @property
    def idle(self) -> bool:
        """Whether it may be given something."""
        return not self.lost and self.step is not None


@dataclass(slots=True)
class Steppers:
    """All members and the answer so far."""

    view: View
    members: list[Stepper] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    sampling: SamplingParams | None = None
    """With every default filled in, by the first of the members."""
    suppressed: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    _tokenizer: str = ""
    _source: int = 1_000
    """Whose defaults these are."""

    def __post_init__(self) -> None:
        self.members = [Stepper(weight) for weight in self.view.weights]

    def open(self, member: int, candidates: int = 0, generate: int = 0) -> Open:
        """Begin, or begin again, with one member."""
        stepper = self.members[member]
        stepper.lost, stepper.step, stepper.known = False, None, len(self.tokens)
        if stepper.opened:
            stepper.rejoined += 1
            stepper.present = False  # until it has caught up
        return Open(member, tuple(self.tokens), candidates, generate)

    def stepped(self, reply: Stepped) -> None:
        """Note a member's word. Raises InvalidRequest if it cannot be part of this ensemble."""
        stepper = self.members[reply.member]
        stepper.step = reply
        if reply.opened is None:
            return
        stepper.opened = True
        stepper.vocabulary = reply.opened.vocab_size
        if reply.opened.tokenizer_fingerprint != (
            self._tokenizer or reply.opened.tokenizer_fingerprint
        ):
            raise InvalidRequest.of(
                "ensemble.members",
                f"worker {reply.opened.worker} has another tokenizer than the others; "
                "tokens can only be combined between equal ones",
            )
        self._tokenizer = reply.opened.tokenizer_fingerprint
        if reply.member <= self._source:
            self._source = reply.member
            self.sampling = reply.opened.sampling
            self.suppressed = tuple(reply.opened.suppressed_ids)
            self.stops = tuple(reply.opened.stop_ids)

    def lose(self, reply: Lost) -> None:
        """A member has failed. Raises QuorumNotMet if too few are left."""
        stepper = self.members[reply.member]
        stepper.lost, stepper.present, stepper.step = True, False, None
        stepper.error = reply.error
        self.check_quorum()

    def check_quorum(self) -> None:
        """Raises QuorumNotMet if too few are there or on their way."""
        present = [stepper for stepper in self.members if not stepper.lost]
        errors = [s.error for s in self.members if s.lost and s.error is not None]
        raise_quorum(self.view, len(present), errors)

    def add(self, token: int) -> None:
        """The answer has one more token."""
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1

    def missing(self, member: int) -> tuple[int, ...]:
        """What a member must still be given."""
        return tuple(self.tokens[self.members[member].known :])

    def rejoin(self, candidates: int = 0) -> list[Command]:
        """Begin again with all that are lost; they prefill the answer so far."""
        lost = [number for number, stepper in enumerate(self.members) if stepper.lost]
        return [self.open(number, candidates) for number in lost]

    def marks(self) -> dict[int, Mark]:
        """What there is to say of each member."""
        return {
            number: Mark(
                agreed=not stepper.lost,
                dissents=stepper.dissents,
                rejoined=stepper.rejoined,
                failed=str(stepper.error) if stepper.lost and stepper.error else "",
            )
            for number, stepper in enumerate(self.members)
        }

    def banned(self, stop_ids: Sequence[int]) -> list[int]:
        """Tokens that must not come next."""
        assert self.sampling is not None
        early = len(self.tokens) < self.sampling.min_tokens
        return [*self.suppressed, *(stop_ids if early else ())]


def rules_of(sampling: SamplingParams) -> Rules:
    """How to choose tokens, from a message with every default filled in."""
    return Rules(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
    )


def first_new(step: Stepped, position: int) -> list[Token]:
    """The records in a step from that place of the answer on."""
    start = step.position - len(step.tokens)
    return list(step.tokens[max(0, position - start) :])
