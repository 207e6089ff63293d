"""One answer in the making: its tokens, how far they are computed, which blocks hold them.

Plain bookkeeping without tensors. A request for n answers is n sequences over one prompt.
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum

from ..sampling import SamplingParams


class State(Enum):
    """Where a sequence stands in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    """Has nothing to compute until its caller's next step."""
    FINISHED = "finished"


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt with one growing answer."""

    request_id: str
    output_index: int
    tokens: list[int]
    """Prompt and answer; the last one may not be in the cache yet."""
    prompt_length: int
    max_length: int
    """Prompt plus the most tokens the answer may have."""
    sampling: SamplingParams
    seed: int
    arrival: int = 0
    """Number in order of arrival, over all sequences of the engine."""
    logprobs_from: int | None = None
    """First prompt position whose log-probability is wanted; at least 1."""
    max_error: float | None = None
    """Of its keys and values, where they are stored in narrow numbers; None for the engine's."""
    shares: bool = True
    """Whether the prefix cache gets its blocks; not once these, passed by a window, have left it
    no room for second digits."""
    leader: "Sequence | None" = None
    """Sequence with the same prompt that computes it first, so that this one finds it cached."""

    state: State = State.WAITING
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    cached: int = 0
    """Tokens that the first admission took from the prefix cache."""
    preemptions: int = 0
    tables: "tuple[array[int], ...]" = ()
    """One block table per cache group; -1 where a block has slid out of the window. Not lists: a
    step copies them whole, and those of long contexts have thousands of blocks."""
    block_hashes: list[bytes] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    """How often each token stands in the answer; kept only for penalties."""

    @property
    def answer_length(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens known but not computed: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def scores_only(self) -> bool:
        """Whether the prompt is computed and nothing is generated."""
        return self.max_length == self.prompt_length

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        if self.sampling.penalised:
            self.counts[token] = self.counts.get(token, 0) + 1
