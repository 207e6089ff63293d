"""What a loaded model and its settings allow, and what is wrong with a request that wants more."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from ..config import EngineConfig
from ..errors import Violation
from ..precision import Precision
from ..sampling import SamplingParams
from .events import Made


@dataclass(frozen=True, slots=True)
class Limits:
    """What the loaded model and the settings allow."""

    vocabulary: int
    max_context: int
    max_logprobs: int
    max_outputs: int
    precision: Precision

    @classmethod
    def of(
        cls, config: EngineConfig, vocabulary: int, max_context: int, precision: Precision
    ) -> "Limits":
        """Limits of an engine."""
        return cls(vocabulary, max_context, config.max_logprobs, config.max_outputs, precision)

    def outside(self, ids: Items[int]) -> str | None:
        """What is wrong with ids of which one is outside the vocabulary."""
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if wrong is None:
            return None
        return f"token id {wrong} is outside the vocabulary of {self.vocabulary}"

    def prompt_violations(
        self, prompt: Items[int], sampling: SamplingParams, field: str
    ) -> list[Violation]:
        """What is wrong with a prompt, called `field` by its caller."""
        limit, length = self.max_context, len(prompt)
        if not length:
            return [Violation(field, "is empty; give at least one token")]
        if sampling.max_tokens == 0:
            room = limit - length
        else:  # an answer needs room for one token at least
            room = limit - length - 1
        if room < 0:
            return [Violation(field, f"has {length} tokens, too long for a context of {limit}")]
        if sampling.max_tokens and length + sampling.max_tokens > limit:
            return [
                Violation(
                    "sampling.max_tokens",
                    f"{sampling.max_tokens} answer tokens do not fit after {length} prompt tokens "
                    f"in a context of {limit}; ask for at most {limit - length}",
                )
            ]
        return []

    def sampling_violations(self, sampling: SamplingParams) -> list[Violation]:
        """What this model cannot do for a caller."""
        found = []
        if sampling.n > self.max_outputs:
            found.append(Violation("sampling.n", f"at most {self.max_outputs} are allowed"))
        for name, count in (
            ("logprobs", sampling.logprobs),
            ("prompt_logprobs", sampling.prompt_logprobs),
        ):
            if count is not None and count > self.max_logprobs:
                found.append(
                    Violation(f"sampling.{name}", f"at most {self.max_logprobs} are allowed")
                )
        for name, ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", tuple(sampling.logit_bias)),
        ):
            wrong = self.outside(ids)
            if wrong is not None:
                found.append(Violation(f"sampling.{name}", wrong))
        return found


def step_violations(sampling: SamplingParams, made: Items[Made]) -> list[Violation]:
    """What a stepped answer cannot have."""
    found = []
    if sampling.n != 1:
        found.append(Violation("sampling.n", "must be 1: one answer is stepped"))
    if sampling.max_tokens == 0:
        found.append(Violation("sampling.max_tokens", "must not be 0: no step could be made"))
    if sampling.prompt_logprobs is not None:
        found.append(Violation("sampling.prompt_logprobs", "no step tells the prompt's tokens"))
    if any(each.ended for each in made):
        found.append(Violation("made[0].ended", "an answer that has ended cannot be stepped"))
    return found
