"""What an ensemble may still spend, in tokens and in cost. Pure.

A call takes the most that it could need beforehand and gives back what it did not, so the caps
hold; only what a retry or a resume computes again after a worker's death is not counted. Bytes
stand for the tokens of a prompt that nobody has counted yet; a byte-level tokenizer never makes
more.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Allowance:
    """None is without a cap."""

    tokens: float | None = None
    cost: float | None = None

    @property
    def unlimited(self) -> bool:
        """Whether nothing needs to be counted."""
        return self.tokens is None and self.cost is None

    def grant(self, prompt_tokens: int, answer_tokens: int, price: float) -> int:
        """Answer tokens that a call may have, at most `answer_tokens`; 0 if it may not begin.

        Args:
            prompt_tokens: at most.
            price: cost of 1,000 tokens.
        """
        room = float(prompt_tokens + answer_tokens)
        if self.tokens is not None:
            room = min(room, self.tokens)
        if self.cost is not None and price > 0:
            room = min(room, self.cost * 1000 / price)
        granted = int(room) - prompt_tokens
        if granted <= 0:
            return 0
        self._move(-(prompt_tokens + granted), price)
        return granted

    def afford(self, tokens: int, price: float) -> bool:
        """Take what a call needs that makes no answer; False if it may not begin."""
        return self.grant(tokens, 1, price) > 0

    def give_back(self, tokens: int, price: float) -> None:
        """A call has needed that many tokens less than it was granted."""
        self._move(tokens, price)

    def _move(self, tokens: int, price: float) -> None:
        if self.tokens is not None:
            self.tokens += tokens
        if self.cost is not None:
            self.cost += tokens * price / 1000
