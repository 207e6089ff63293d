"""The text of one answer as it grows, and where it ends: token by token, by nothing but its tokens.

So an answer that was begun elsewhere can be taken over: pushed through again, its tokens bring this
machine into the very state in which they left the other one, held text and all.
"""

from collections.abc import Sequence as Items

from ..sampling import SamplingParams
from ..scheduling.sequence import FinishReason
from ..text.detokenizer import Detokenizer, StopText
from ..text.tokenizer import Tokenizer


class AnswerText:
    """Text machines and ending rules of one answer.

    Args:
        tokenizer: makes text of tokens.
        prompt: the prompt's token ids.
        sampling: with max_tokens set.
        stop_ids: tokens that end the answer once min_tokens are there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Items[int],
        sampling: SamplingParams,
        stop_ids: frozenset[int],
    ) -> None:
        assert sampling.max_tokens is not None
        self.most = sampling.max_tokens
        """Tokens it may have."""
        self._sampling = sampling
        self._stop_ids = stop_ids
        self._detokenizer = Detokenizer(tokenizer, prompt, sampling.skip_special_tokens)
        self._stop = StopText(sampling.stop, sampling.include_stop)
        self.length = 0
        """Tokens so far."""
        self.reason: FinishReason | None = None
        """Why the answer has ended; None while it goes on."""
        self.matched: int | str | None = None
        """The stop token or stop text that ended it."""

    def push(self, token: int) -> str:
        """The text that this token completes; sets `reason` if it ends the answer."""
        assert self.reason is None, "the answer has ended"
        self.length += 1
        may_stop = self.length >= self._sampling.min_tokens
        if token in self._stop_ids and may_stop:
            self.reason, self.matched = FinishReason.STOP, token
            text = self._stop.flush()
            text += self._detokenizer.push(token) if self._sampling.include_stop else ""
            return text + self._detokenizer.flush()
        text = self._detokenizer.push(token)
        if may_stop:
            text = self._stop.push(text)
            if self._stop.matched is not None:
                self.reason, self.matched = FinishReason.STOP, self._stop.matched
                return text
        if self.length < self.most:
            return text
        self.reason = FinishReason.LENGTH
        return text + self._last_words(may_stop)

    def _last_words(self, may_stop: bool) -> str:
        """Everything still held when the answer has reached its length."""
        rest = self._detokenizer.flush()
        return (self._stop.push(rest) if may_stop else rest) + self._stop.flush()
