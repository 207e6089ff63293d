"""An answer that its caller steps: chosen tokens go in, the next distribution comes out, in turns.

    with engine.step("Once upon a time", candidates=50) as stepper:
        step = stepper.open()
        while step.end is None:
            step = stepper.take([step.ids[0]])  # greedy

Between two steps the sequence is parked in the engine; what it has computed stays, as long as
there is room.
"""

import queue
from collections.abc import Callable
from collections.abc import Sequence as Items
from types import TracebackType
from typing import Self

from ..errors import InvalidRequest
from ..running.sampler import Choice
from ..scheduling.sequence import Sequence
from ..text.tokenizer import Tokenizer
from .answer import Answer
from .events import Event, Failed, Opened, Request, Stepped, TokenRecord

Likeliest = tuple[list[int], list[float]]
"""Token ids and their log-probabilities, in descending order."""


class StepAnswer(Answer):
    """The one output of a stepped request; it owes one response to each step.

    Args:
        request: with `steps`.
        sequences: one.
        tokenizer: makes text of tokens.
        arrived: when the request reached the engine, on the clock of time.monotonic().
    """

    def __init__(
        self, request: Request, sequences: Items[Sequence], tokenizer: Tokenizer, arrived: float
    ) -> None:
        super().__init__(request, sequences, tokenizer, arrived)
        assert request.steps is not None
        (self.sequence,) = self.sequences
        self._output = self._outputs[0]
        self._steps = request.steps
        self._suppressed = tokenizer.suppressed_ids
        self._to_open = True
        self._to_choose = request.steps.generate
        self._told: Likeliest | None = None
        self.owes = True
        """Whether the caller waits for a response."""

    @property
    def candidates(self) -> int:
        """How many of the likeliest tokens a distribution tells."""
        return self._steps.candidates

    @property
    def chooses(self) -> bool:
        """Whether the engine chooses the next token; else the caller wants the distribution."""
        return self._to_choose > 0

    def take(self, ids: Items[int], generate: int, first: Choice | None) -> None:
        """Begin a step.

        Args:
            ids: tokens that the caller has chosen.
            generate: tokens to choose behind them.
            first: the first of the ids with its log-probability, if that is wanted and known.

        Raises:
            InvalidRequest: the answer ends before the last of the ids.
        """
        assert not self.owes, "a step began before the last one had ended"
        self.owes, self._to_choose, self._told = True, generate, None
        for number, token in enumerate(ids):
            if self._output.end is not None:
                raise InvalidRequest.of(
                    "take.ids", f"go on behind the answer's end, which is number {number - 1}"
                )
            known = first if number == 0 and first is not None else Choice(token)
            self._add(self._output, known)

    def accept(self, sequence: Sequence, choice: Choice, now: float) -> bool:
        """Add a token that the engine has chosen; True if that ends the answer."""
        self._to_choose -= 1
        if self._to_choose == 0:
            self._told = ([], [])
        return super().accept(sequence, choice, now)

    def tell(self, likeliest: Likeliest) -> None:
        """Take the distribution that the caller waits for."""
        self._told = likeliest

    def take_events(self, now: float) -> list[Event]:
        """The response, once it is complete."""
        if not self.owes or (self._told is None and not self.finished):
            return []
        ids, logprobs = self._told or ([], [])
        response = Stepped(
            position=self.sequence.answer_length,
            tokens=tuple(self._output.unsent),
            end=self._output.end,
            ids=tuple(ids),
            logprobs=tuple(logprobs),
            opened=self._opened() if self._to_open else None,
        )
        self._output.unsent.clear()
        self.owes = self._to_open = False
        return [response]

    def _opened(self) -> Opened:
        request = self.request
        return Opened(
            prompt=request.prompt,
            cached_tokens=self.cached_tokens,
            sampling=request.sampling,
            stop_ids=tuple(sorted(request.stop_ids)),
            suppressed_ids=self._suppressed,
        )


class Stepper:
    """Steps one answer from a thread of its own; made by `Engine.step`. Leaving it frees it.

    Args:
        submit: hands the request in.
        take: begins a step, by ids and how many tokens to generate.
        cancel: gives the answer up.
    """

    def __init__(
        self,
        submit: Callable[[], None],
        take: Callable[[Items[int], int], None],
        cancel: Callable[[], None],
    ) -> None:
        self._submit = submit
        self._take = take
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._opened = False
        self._over = False
        self.tokens: list[TokenRecord] = []
        """All that the steps have brought."""

    @property
    def text(self) -> str:
        """Text of the answer so far."""
        return "".join(token.text for token in self.tokens)

    def put(self, events: Items[Event]) -> None:
        """The request's sink; called by the engine."""
        for event in events:
            self._events.put(event)

    def open(self) -> Stepped:
        """Compute the prompt; returns the distribution of the first token, or generated tokens.

        Raises:
            ConclaveError: the engine refuses, or the answer broke.
            InvalidRequest: it is open already.
        """
        if self._opened:
            raise InvalidRequest.of("open", "the answer is open already")
        self._opened = True
        self._submit()
        return self._response()

    def take(self, ids: Items[int] = (), generate: int = 0) -> Stepped:
        """Add tokens to the answer, then generate some, or learn the distribution of the next.

        Args:
            ids: what the caller has chosen; may be empty.
            generate: at most so many tokens the engine then chooses by the sampling parameters;
                with 0 it tells the distribution of the next token.

        Raises:
            ConclaveError: the answer broke.
            InvalidRequest: it is not open or has ended, the ids go on behind its end, or they are
                outside the vocabulary.
        """
        if not self._opened or self._over:
            raise InvalidRequest.of("take", "the answer is not open, or has ended")
        self._take(ids, generate)
        return self._response()

    def close(self) -> None:
        """Give the answer up unless it has ended."""
        if self._opened and not self._over:
            self._over = True
            self._cancel()

    def _response(self) -> Stepped:
        event = self._events.get()
        if isinstance(event, Failed):
            self._over = True
            raise event.error
        assert isinstance(event, Stepped)
        self._over = event.end is not None
        self.tokens.extend(event.tokens)
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
