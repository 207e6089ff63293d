"""Text of an answer as it grows: no code point is split, stop texts are found across tokens.

Two small machines that see one token, or one piece of text, at a time. What has been released is
never taken back: text that may still become a code point or a stop text is held.
"""

from collections.abc import Sequence

from .tokenizer import Tokenizer

_CONTEXT = 6
"""Tokens decoded in front of new ones, because some decoders treat a text's first token apart."""
_LONGEST_HOLD = 64
"""Tokens after which an unfinished code point is released as U+FFFD: it is not text at all."""


class Detokenizer:
    """Incremental decoding (the prefix/read offsets of text-generation-inference and vLLM).

    Args:
        tokenizer: decodes.
        prompt: the prompt's token ids; the last few give the first answer token its context.
        skip_special: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids = list(prompt[-_CONTEXT:])
        while self._ids and self._decode(self._ids).startswith("\ufffd"):
            del self._ids[0]  # the cut went through a code point
        self._read = len(self._ids)
        # A prompt may end inside a code point; the answer then brings the whole of it.
        self._known = self._decode(self._ids).rstrip("\ufffd")

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a code point is open."""
        self._ids.append(token)
        text = self._decode(self._ids)
        held = len(self._ids) - self._read
        if text.endswith("\ufffd") and held < _LONGEST_HOLD:
            return ""
        return self._release(text)

    def flush(self) -> str:
        """What is still held, at the end of the answer."""
        return self._release(self._decode(self._ids)) if self._read < len(self._ids) else ""

    def _release(self, text: str) -> str:
        new = text[len(self._known) :]
        self._ids = self._ids[self._read :]  # the tokens just released give the next ones context
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)


class StopText:
    """Watches a growing text for stop texts.

    Args:
        stops: the texts that end the answer.
        include: release the stop text itself too.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop text that was found."""

    def push(self, text: str) -> str:
        """The text that may be shown; sets `matched` if a stop text is complete."""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops]
        present = [(at, -len(stop), stop) for at, stop in found if at >= 0]
        if present:
            at, _, self.matched = min(present)
            end = at + len(self.matched) if self._include else at
            released, self._held = self._held[:end], ""
            return released
        keep = self._open_suffix()
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def flush(self) -> str:
        """What was held back, now that no stop text can follow."""
        released, self._held = self._held, ""
        return released

    def _open_suffix(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
