"""The way in: prompts become token ids, loose fields become checked parameters, or are refused.

Everything that can be wrong with a request is found here, in the caller's thread, before the engine
sees it; each refusal names the field.
"""

import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Items

from ..errors import InvalidRequest, Violation
from ..knobs import Knobs
from ..sampling import SamplingParams
from ..text.tokenizer import Tokenizer
from .answer_text import AnswerText
from .events import Made, Request, Sink, Steps
from .limits import Limits, step_violations

Message = Mapping[str, object]
"""A chat turn such as {"role": "user", "content": "..."}."""
Prompt = str | Items[int] | Items[Message]
"""Text, token ids, or chat turns."""

ANY_WEIGHTS = Knobs()
"""Asks nothing of a model's weights."""


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
        made: Items[Made] = (),
        knobs: Knobs = ANY_WEIGHTS,
    ) -> Request:
        """A request for answers.

        Args:
            prompt: token ids.
            fields: sampling fields that the caller gave; the others take the checkpoint's word.
            sink: takes the events.
            request_id: made up if empty.
            deadline: on the clock of time.monotonic().
            whole: keep all events until the end.
            made: what the outputs have already, by output index.
            knobs: the least that the weights must be.

        Raises:
            InvalidRequest: with every field at fault.
        """
        sampling = self._sampling(fields)
        self._check(prompt, sampling, knobs.limits_broken(self.limits.precision))
        # What is made of output 0 went out behind the prompt's tokens.
        told = bool(made) and bool(made[0].ids or made[0].ended)
        return self._request(
            prompt,
            sampling,
            sink,
            made=made,
            request_id=request_id,
            deadline=deadline,
            logprobs_from=None if sampling.prompt_logprobs is None or told else 1,
            whole=whole,
            max_error=knobs.max_error,
        )

    def stepping(
        self,
        prompt: Items[int],
        fields: Mapping[str, object],
        sink: Sink,
        *,
        candidates: int = 0,
        generate: int = 0,
        made: Items[Made] = (),
        request_id: str = "",
        deadline: float | None = None,
        knobs: Knobs = ANY_WEIGHTS,
    ) -> Request:
        """A request for one answer that its caller steps.

        Args:
            prompt, fields, sink, made, request_id, deadline, knobs: see `generation`.
            candidates: how many of the likeliest next tokens each response tells.
            generate: tokens to choose right after the prompt.

        Raises:
            InvalidRequest: with every field at fault.
        """
        sampling = self._sampling(fields)
        broken = knobs.limits_broken(self.limits.precision)
        self._check(prompt, sampling, [*step_violations(sampling, made), *broken])
        self.check_step((), generate, "open")
        if not 0 <= candidates <= self.limits.vocabulary:
            raise InvalidRequest.of(
                "open.candidates", f"must lie between 0 and {self.limits.vocabulary} (vocabulary)"
            )
        return self._request(
            prompt,
            sampling,
            sink,
            made=made,
            request_id=request_id,
            deadline=deadline,
            steps=Steps(candidates, generate),
            max_error=knobs.max_error,
        )

    def check_step(self, ids: Items[int], generate: int, field: str = "take") -> None:
        """Raises InvalidRequest for ids outside the vocabulary or a count below zero."""
        self._check_ids(f"{field}.ids", ids)
        if generate < 0:
            raise InvalidRequest.of(f"{field}.generate", "must not be below 0")

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
        return self._request(
            prompt,
            sampling,
            sink,
            request_id=request_id,
            deadline=deadline,
            logprobs_from=start,
            whole=True,
        )

    def _sampling(self, fields: Mapping[str, object]) -> SamplingParams:
        return SamplingParams.checked({**self.tokenizer.sampling_defaults, **fields})

    def _request(
        self,
        prompt: Items[int],
        sampling: SamplingParams,
        sink: Sink,
        *,
        request_id: str,
        deadline: float | None,
        made: Items[Made] = (),
        logprobs_from: int | None = None,
        whole: bool = False,
        steps: Steps | None = None,
        max_error: float | None = None,
    ) -> Request:
        """A request whose prompt and parameters are right; what is open in them is decided."""
        sampling = self._decided(sampling, len(prompt))
        own = () if sampling.ignore_eos else self.tokenizer.stop_ids
        stop_ids = frozenset((*own, *sampling.stop_token_ids))
        if len(made) > sampling.n:
            raise InvalidRequest.of("made", f"has {len(made)} entries for {sampling.n} answers")
        filled = (*made, *[Made()] * (sampling.n - len(made)))
        texts = tuple(
            AnswerText(self.tokenizer, prompt, sampling, stop_ids) for _ in range(sampling.n)
        )
        for index, (each, text) in enumerate(zip(filled, texts, strict=True)):
            self._replay(f"made[{index}].ids", each, text)
        return Request(
            id=request_id or new_id(),
            prompt=tuple(prompt),
            sampling=sampling,
            sink=sink,
            stop_ids=stop_ids,
            made=filled,
            texts=texts,
            deadline=deadline,
            logprobs_from=logprobs_from,
            whole=whole,
            steps=steps,
            max_error=max_error,
        )

    def _decided(self, sampling: SamplingParams, length: int) -> SamplingParams:
        """With max_tokens and seed, behind a prompt of that length."""
        room = self.limits.max_context - length
        most = room if sampling.max_tokens is None else sampling.max_tokens
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        return sampling.model_copy(update={"max_tokens": most, "seed": seed})

    def _replay(self, field: str, made: Made, text: AnswerText) -> None:
        """Bring an answer's text to where its made tokens have left it."""
        self._check_ids(field, made.ids)
        if len(made.ids) > text.most:
            rule = f"has {len(made.ids)} tokens; the answer may have {text.most}"
            raise InvalidRequest.of(field, rule)
        for token in () if made.ended else made.ids:
            if text.reason is not None:
                raise InvalidRequest.of(
                    field, f"goes on behind the answer's end, which is number {text.length - 1}"
                )
            text.push(token)

    def _check(
        self,
        prompt: Items[int],
        sampling: SamplingParams,
        more: Items[Violation] = (),
        prompt_field: str = "prompt",
    ) -> None:
        found = [
            *self.limits.prompt_violations(prompt, sampling, prompt_field),
            *self.limits.sampling_violations(sampling),
            *more,
        ]
        if found:
            raise InvalidRequest(found)

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
        wrong = self.limits.outside(ids)
        if wrong is not None:
            raise InvalidRequest.of(field, wrong)


def new_id() -> str:
    """A request id for a caller that gave none."""
    return secrets.token_hex(8)
