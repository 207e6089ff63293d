"""The words between a strategy and whoever carries it out."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from ...protos.generation_pb2 import GenerateResponse, OutputEnd, Prompt, Token
from ...protos.worker_pb2 import StepOpened
from ...worker.errors import ConclaveError


class QuorumNotMet(ConclaveError):
    """Fewer members took part than the ensemble needs."""


@dataclass(frozen=True, slots=True)
class View:
    """What a strategy knows of its members."""

    weights: tuple[float, ...]
    """One a member, in the order of the spec."""
    quorum: int
    """Members that must take part."""
    hasty: bool = False
    """Whether the caller set the quorum: then the decision falls as soon as it is met."""
    seed: int = 0

    @property
    def width(self) -> int:
        """How many members there are."""
        return len(self.weights)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of one member."""

    tokens: tuple[Token, ...]
    end: OutputEnd
    mean_logprob: float = 0.0
    """Natural logarithm, a token."""

    @property
    def text(self) -> str:
        """What its tokens say."""
        return "".join(token.text for token in self.tokens)


# Commands. `call` is a number of the strategy's own choice, used once.


@dataclass(frozen=True, slots=True)
class Ask:
    """Let a member answer."""

    call: int
    member: int
    role: str
    live: bool = False
    """Whether each event is to be heard before the end."""
    seed: int | None = None
    """Instead of the request's."""
    prompt: Prompt | None = None
    """Instead of the request's."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Let a member tell how likely each of these answers is to the prompt."""

    call: int
    member: int
    role: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Cancel a call; nothing more comes of it."""

    call: int


@dataclass(frozen=True, slots=True)
class Alarm:
    """Ring after so many seconds; the name tells alarms apart, a later one replaces an earlier."""

    seconds: float
    name: str = ""
    keep: float = 0.0
    """The fraction of the reserve for extra work that this one must leave untouched."""


@dataclass(frozen=True, slots=True)
class Disarm:
    """The alarm need not ring."""

    name: str = ""


@dataclass(frozen=True, slots=True)
class Say:
    """Pass an event on to the caller."""

    event: GenerateResponse


@dataclass(frozen=True, slots=True)
class Open:
    """Begin to step a member."""

    member: int
    made: tuple[int, ...] = ()
    candidates: int = 0
    generate: int = 0


@dataclass(frozen=True, slots=True)
class Take:
    """Give a stepping member the tokens that it lacks."""

    member: int
    ids: tuple[int, ...]
    generate: int = 0


@dataclass(frozen=True, slots=True)
class Shut:
    """End a member's stepping."""

    member: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tell:
    """Pass one token of a stepped answer on."""

    token: Token


Command = Ask | Judge | Drop | Alarm | Disarm | Say | Open | Take | Shut | Tell


# Replies.


@dataclass(frozen=True, slots=True)
class Heard:
    """New tokens of a live call."""

    call: int
    event: GenerateResponse


@dataclass(frozen=True, slots=True)
class Ended:
    """A call has ended well."""

    call: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Judged:
    """One mean log-likelihood a token for each answer that was to be judged."""

    call: int
    means: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Broke:
    """A call has failed or run out of its time."""

    call: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Rang:
    """An alarm."""

    name: str = ""
    granted: bool = True
    """Whether the budget for extra work allows some."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """A stepping member has done what it was told."""

    member: int
    position: int
    """Tokens that its answer has."""
    tokens: tuple[Token, ...] = ()
    end: OutputEnd | None = None
    ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    opened: StepOpened | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """A stepping member has failed."""

    member: int
    error: Exception


Reply = Heard | Ended | Judged | Broke | Rang | Stepped | Lost


@dataclass(frozen=True, slots=True)
class Mark:
    """What the strategy says of one call or one stepping member in its report."""

    agreed: bool = False
    score: float | None = None
    answer: str | None = None
    dissents: int = 0
    rejoined: int = 0
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an ensemble ended."""

    answer: Answer | None
    """The answer, if it has not been said already."""
    end: OutputEnd
    agreement: float | None = None
    marks: dict[int, Mark] = field(default_factory=dict)
    """By call, or by member for what was stepped."""
    winner: int = 0
    """The call, or the member, whose words the answer's are."""
    last: Sequence[Command] = ()
    """What is still to be passed on."""


Strategy = Generator[Sequence[Command], Reply, Verdict]


def raise_quorum(view: View, answered: int, errors: Sequence[Exception]) -> None:
    """Raises QuorumNotMet if too few answered."""
    if answered < view.quorum:
        reasons = "; ".join(dict.fromkeys(str(error) for error in errors)) or "none was there"
        raise QuorumNotMet(
            f"{answered} of {view.width} members answered, the quorum is {view.quorum}: {reasons}"
        )
