"""What the engine is asked and what it says while answering: plain, frozen, thread-safe values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConclaveError
from ..sampling import SamplingParams
from ..scheduling.sequence import FinishReason


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


Event = Delta | Finished | Failed
Sink = Callable[[Sequence[Event]], None]
"""Called in the engine's thread, at most once a step; must be quick and must not raise."""


@dataclass(frozen=True, slots=True)
class Request:
    """One ask, checked and tokenised."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    sink: Sink
    deadline: float | None = None
    """On the clock of time.monotonic()."""
    logprobs_from: int | None = None
    """First prompt position whose log-probability is wanted; at least 1."""
    whole: bool = False
    """Keep all events until the end."""
