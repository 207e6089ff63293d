"""The way in: prompts become token ids, loose fields become checked parameters, or are refused.

Everything that can be wrong with a request is found here, in the caller's thread, before the engine
sees it; each refusal names the field.
"""

import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from ..config import EngineConfig
from ..errors import InvalidRequest, Violation
from ..sampling import SamplingParams
from ..text.tokenizer import Tokenizer
from .events import Request, Sink

Message = Mapping[str, object]
"""A chat turn such as {"role": "user", "content": "..."}."""
Prompt = str | Items[int] | Items[Message]
"""Text, token ids, or chat turns."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the loaded model and the settings allow."""

    vocabulary: int
    max_context: int
    max_logprobs: int
    max_outputs: int

    @classmethod
    def of(cls, config: EngineConfig, vocabulary: int, max_context: int) -> "Limits":
        """Limits of an engine."""
        return cls(vocabulary, max_context, config.max_logprobs, config.max_outputs)


class Intake:
    """Builds requests that the engine can run.

    Args:
        tokenizer: of the loaded checkpoint.
        limits: what the model allows.
    """

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits

    def encode(self, prompt: Prompt, **chat: object) -> list[int]:
        """Token ids of a prompt in any of its three forms.

        Args:
            prompt: text, token ids, or chat messages.
            chat: `thinking`, `tools`, `add_generation_prompt`, for chat messages only.

        Raises:
            InvalidRequest: the prompt is empty, or holds ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            self._check_length(prompt)
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.chat(prompt, **chat)  # type: ignore[arg-type]
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]
        self._check_ids("prompt.token_ids.ids", ids)
        return ids

    def generation(
        self,
        prompt: Items[int],
        fields: Mapping[str, object],
        sink: Sink,
        *,
        request_id: str = "",
        deadline: float | None = None,
        whole: bool = False,
    ) -> Request:
        """A request for answers.

        Args:
            prompt: token ids.
            fields: sampling fields that the caller gave; the others take the checkpoint's word.
            sink: takes the events.
            request_id: made up if empty.
            deadline: on the clock of time.monotonic().
            whole: keep all events until the end.

        Raises:
            InvalidRequest: with every field at fault.
        """
        sampling = SamplingParams.checked({**self.tokenizer.sampling_defaults, **fields})
        self._check(prompt, sampling)
        wanted = None if sampling.prompt_logprobs is None else 1
        return Request(
            request_id or new_id(), tuple(prompt), sampling, sink, deadline, wanted, whole
        )

    def scoring(
        self,
        context: Items[int],
        continuation: Items[int],
        sink: Sink,
        *,
        candidates: int = 0,
        request_id: str = "",
        deadline: float | None = None,
    ) -> Request:
        """A request for the log-probabilities of a continuation; generates nothing.

        Raises:
            InvalidRequest: nothing to score, or too long for the context.
        """
        prompt = (*context, *continuation)
        start = max(1, len(context))
        if start >= len(prompt):
            raise InvalidRequest.of(
                "continuations", "nothing to score: give a context, or at least two tokens"
            )
        sampling = SamplingParams.checked(
            {"temperature": 0.0, "max_tokens": 0, "prompt_logprobs": candidates}
        )
        self._check(prompt, sampling, prompt_field="continuations")
        return Request(request_id or new_id(), prompt, sampling, sink, deadline, start, True)

    def _check(
        self, prompt: Items[int], sampling: SamplingParams, prompt_field: str = "prompt"
    ) -> None:
        found = [
            *self._prompt_violations(prompt, sampling, prompt_field),
            *self._sampling_violations(sampling),
        ]
        if found:
            raise InvalidRequest(found)

    def _prompt_violations(
        self, prompt: Items[int], sampling: SamplingParams, field: str
    ) -> list[Violation]:
        limit, length = self.limits.max_context, len(prompt)
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

    def _sampling_violations(self, sampling: SamplingParams) -> list[Violation]:
        limits, found = self.limits, []
        if sampling.n > limits.max_outputs:
            found.append(Violation("sampling.n", f"at most {limits.max_outputs} are allowed"))
        for name, count in (
            ("logprobs", sampling.logprobs),
            ("prompt_logprobs", sampling.prompt_logprobs),
        ):
            if count is not None and count > limits.max_logprobs:
                found.append(
                    Violation(f"sampling.{name}", f"at most {limits.max_logprobs} are allowed")
                )
        for name, ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", tuple(sampling.logit_bias)),
        ):
            wrong = self._outside(ids)
            if wrong is not None:
                found.append(Violation(f"sampling.{name}", self._outside_message(wrong)))
        return found

    def _check_length(self, text: str) -> None:
        """Refuse a text that cannot fit before spending minutes on its tokens."""
        most = self.limits.max_context * self.tokenizer.longest_token
        if len(text) > most > 0:
            raise InvalidRequest.of(
                "prompt",
                f"has {len(text)} characters, too long for a context of "
                f"{self.limits.max_context} tokens",
            )

    def _check_ids(self, field: str, ids: Items[int]) -> None:
        wrong = self._outside(ids)
        if wrong is not None:
            raise InvalidRequest.of(field, self._outside_message(wrong))

    def _outside(self, ids: Items[int]) -> int | None:
        return next((token for token in ids if not 0 <= token < self.limits.vocabulary), None)

    def _outside_message(self, token: int) -> str:
        return f"token id {token} is outside the vocabulary of {self.limits.vocabulary}"


def new_id() -> str:
    """A request id for a caller that gave none."""
    return secrets.token_hex(8)
