"""What the engine is asked and what it says while answering: plain, frozen, thread-safe values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConclaveError
from ..sampling import SamplingParams
from ..scheduling.sequence import FinishReason
from .answer_text import AnswerText


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One token of an answer or a prompt, with its neighbours.

    Log-probabilities are natural logarithms under the model's own distribution, before temperature,
    penalties, bias and cuts.
    """

    id: int
    text: str
    logprob: float | None = None
    rank: int | None = None
    candidates: tuple["CandidateRecord", ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateRecord:
    """A token that might have been chosen."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one answer; prompt tokens come once, with the first delta of output 0."""

    output_index: int
    tokens: tuple[TokenRecord, ...]
    prompt_tokens: tuple[TokenRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputEnd:
    """How one of the answers ended."""

    output_index: int
    reason: FinishReason
    matched: int | str | None
    """The stop token or stop text."""
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; completions are summed over its outputs."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the request reached the engine."""

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class Finished:
    """Terminal event of a request that ended well."""

    outputs: tuple[OutputEnd, ...]
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal event of a request that did not."""

    error: ConclaveError


@dataclass(frozen=True, slots=True)
class Opened:
    """What a stepped answer was opened with, every default filled in."""

    prompt: tuple[int, ...]
    cached_tokens: int
    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    """They end the answer once min_tokens are there."""
    suppressed_ids: tuple[int, ...]
    """They must never be chosen."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Response to one step; terminal if it has an end."""

    position: int
    """Tokens the answer has now."""
    tokens: tuple[TokenRecord, ...]
    """Those that the step brought."""
    end: OutputEnd | None = None
    ids: tuple[int, ...] = ()
    """The likeliest next tokens, in descending order, if the step generated none."""
    logprobs: tuple[float, ...] = ()
    """Theirs, natural logarithms under the model's own distribution."""
    opened: Opened | None = None
    """In the first response."""


Event = Delta | Finished | Failed | Stepped
Sink = Callable[[Sequence[Event]], None]
"""Called in the engine's thread, at most once a step; must be quick and must not raise."""


@dataclass(frozen=True, slots=True)
class Made:
    """What an answer has already when it is asked for: the engine goes on behind it."""

    ids: tuple[int, ...] = ()
    ended: bool = False
    """The caller has this answer whole; nothing is done or told of it."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What makes an answer one that its caller steps."""

    candidates: int
    """How many of the likeliest next tokens a response tells."""
    generate: int
    """Tokens to choose right after the prompt."""


@dataclass(frozen=True, slots=True)
class Request:
    """One ask, checked and tokenised."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    """With max_tokens and seed set."""
    sink: Sink
    stop_ids: frozenset[int]
    """Tokens that end an answer: the checkpoint's, unless ignored, and the caller's."""
    made: tuple[Made, ...]
    """One for each output."""
    texts: tuple[AnswerText, ...]
    """One for each output, behind what is made of it; the engine's own once it has the request."""
    deadline: float | None = None
    """On the clock of time.monotonic()."""
    logprobs_from: int | None = None
    """First prompt position whose log-probability is wanted; at least 1."""
    whole: bool = False
    """Keep all events until the end."""
    steps: Steps | None = None
    max_error: float | None = None
    """Of keys and values where they are stored in narrow numbers; None for the engine's."""
