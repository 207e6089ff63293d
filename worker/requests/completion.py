"""Answers for callers in the same process: a notebook, a script, a test."""

import queue
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from .events import Delta, Event, Failed, Finished, OutputEnd, TokenRecord


@dataclass(frozen=True, slots=True)
class Output:
    """One whole answer."""

    text: str
    tokens: tuple[TokenRecord, ...]
    end: OutputEnd

    @property
    def token_ids(self) -> list[int]:
        """Ids of the answer's tokens."""
        return [token.id for token in self.tokens]


@dataclass(frozen=True, slots=True)
class Completion:
    """All answers to one prompt."""

    outputs: tuple[Output, ...]
    finished: Finished
    prompt_tokens: tuple[TokenRecord, ...]

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first answer."""
        return self.outputs[0].token_ids

    @classmethod
    def of(cls, deltas: Items[Delta], finished: Finished) -> "Completion":
        """Put the events of one request together."""
        outputs = []
        for end in finished.outputs:
            mine = [d for d in deltas if d.output_index == end.output_index]
            tokens = tuple(token for delta in mine for token in delta.tokens)
            outputs.append(Output("".join(token.text for token in tokens), tokens, end))
        prompt = tuple(token for delta in deltas for token in delta.prompt_tokens)
        return cls(tuple(outputs), finished, prompt)


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of one continuation, natural logarithm."""

    logprob: float
    tokens: tuple[TokenRecord, ...]

    @property
    def scored_tokens(self) -> int:
        """Tokens in the sum: those that have something before them."""
        return sum(token.logprob is not None for token in self.tokens)

    @classmethod
    def of(cls, tokens: tuple[TokenRecord, ...]) -> "Score":
        """Sum up scored tokens."""
        return cls(sum(token.logprob or 0.0 for token in tokens), tokens)


class Stream:
    """Iterates over the deltas of one request as they come; closing it early cancels the request.

    Args:
        cancel: gives the request up.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deltas: list[Delta] = []
        self._finished: Finished | None = None
        self._failed: Failed | None = None

    def put(self, events: Items[Event]) -> None:
        """The request's sink; called by the engine."""
        for event in events:
            self._events.put(event)

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        if self._failed is not None:
            raise self._failed.error
        if self._finished is not None:
            raise StopIteration
        event = self._events.get()
        if isinstance(event, Delta):
            self._deltas.append(event)
            return event
        if isinstance(event, Failed):
            self._failed = event
        if isinstance(event, Finished):
            self._finished = event
        return next(self)

    def result(self) -> Completion:
        """Wait for the end and put everything together; raises what the request failed with."""
        for _ in self:
            pass
        assert self._finished is not None
        return Completion.of(self._deltas, self._finished)

    def close(self) -> None:
        """Give the request up unless it has ended."""
        if self._finished is None and self._failed is None:
            self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
