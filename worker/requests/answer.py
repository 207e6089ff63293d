"""A request on its way: its sequences, the text released so far, when each answer ends.

No tensors and no threads: the engine hands in chosen tokens and takes events out.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from ..sampler import Choice
from ..scheduling.sequence import FinishReason, Sequence
from ..text.detokenizer import Detokenizer, StopText
from ..text.tokenizer import Tokenizer
from .events import (
    CandidateRecord,
    Delta,
    Event,
    Finished,
    OutputEnd,
    Request,
    Timings,
    TokenRecord,
    Usage,
)


@dataclass(slots=True)
class _Output:
    """One of the n answers: its text machines and what has not been sent yet."""

    sequence: Sequence
    detokenizer: Detokenizer
    stop: StopText
    unsent: list[TokenRecord] = field(default_factory=list)
    end: OutputEnd | None = None


class Answer:
    """All outputs of one request.

    Args:
        request: what was asked.
        sequences: one for each output, by output index.
        tokenizer: makes text of tokens.
        stop_ids: tokens that end the answer (the checkpoint's, unless ignored, and the caller's).
        arrived: when the request reached the engine, on the clock of time.monotonic().
    """

    def __init__(
        self,
        request: Request,
        sequences: Items[Sequence],
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        arrived: float,
    ) -> None:
        self.request = request
        self.sequences = tuple(sequences)
        self.stop_ids = stop_ids
        self._tokenizer = tokenizer
        self._arrived = arrived
        self._started = 0.0
        self._first_token = 0.0
        sampling = request.sampling
        self._outputs = [
            _Output(
                sequence,
                Detokenizer(tokenizer, request.prompt, sampling.skip_special_tokens),
                StopText(sampling.stop, sampling.include_stop),
            )
            for sequence in sequences
        ]
        self._prompt_choices: list[Choice] = []
        self._prompt_sent = request.logprobs_from is None

    @property
    def next_scored(self) -> int | None:
        """The next prompt position whose log-probability is wanted; None if none is left."""
        start = self.request.logprobs_from
        if start is None or start + len(self._prompt_choices) >= len(self.request.prompt):
            return None
        return start + len(self._prompt_choices)

    def start(self, now: float) -> None:
        """Note the request's first step."""
        if not self._started:
            self._started = now

    def score_prompt(self, choices: Items[Choice]) -> None:
        """Take the log-probabilities of the next prompt tokens."""
        self._prompt_choices.extend(choices)

    def accept(self, sequence: Sequence, choice: Choice, now: float) -> bool:
        """Add a chosen token to its answer; True if that ends it."""
        if not self._first_token:
            self._first_token = now
        output = self._outputs[sequence.output_index]
        sequence.append(choice.token)
        text, reason, matched = self._text_and_end(output, choice.token)
        output.unsent.append(self._record(choice, text))
        if reason is not None:
            self._end(output, reason, matched)
        return reason is not None

    def end_scoring(self, now: float) -> None:
        """End a request that generates nothing."""
        self._first_token = now
        for output in self._outputs:
            self._end(output, FinishReason.LENGTH, None)

    @property
    def finished(self) -> bool:
        """Whether all outputs have ended."""
        return all(output.end is not None for output in self._outputs)

    def take_events(self, now: float) -> list[Event]:
        """What is new since the last call; the terminal event once all outputs have ended."""
        finished = self.finished
        if self.request.whole and not finished:
            return []
        events: list[Event] = []
        for output in self._outputs:
            prompt = self._take_prompt() if output.sequence.output_index == 0 else ()
            if output.unsent or prompt:
                events.append(Delta(output.sequence.output_index, tuple(output.unsent), prompt))
                output.unsent.clear()
        if finished:
            events.append(self._finished(now))
        return events

    def _text_and_end(
        self, output: _Output, token: int
    ) -> tuple[str, FinishReason | None, int | str | None]:
        sampling, sequence = self.request.sampling, output.sequence
        may_stop = sequence.answer_length >= sampling.min_tokens
        if token in self.stop_ids and may_stop:
            text = output.stop.flush()
            text += output.detokenizer.push(token) if sampling.include_stop else ""
            return text + output.detokenizer.flush(), FinishReason.STOP, token
        text = output.detokenizer.push(token)
        if may_stop:
            text = output.stop.push(text)
            if output.stop.matched is not None:
                return text, FinishReason.STOP, output.stop.matched
        if len(sequence.tokens) < sequence.max_length:
            return text, None, None
        return text + self._last_words(output, may_stop), FinishReason.LENGTH, None

    def _last_words(self, output: _Output, may_stop: bool) -> str:
        """Everything still held when the answer has reached its length."""
        rest = output.detokenizer.flush()
        return (output.stop.push(rest) if may_stop else rest) + output.stop.flush()

    def _end(self, output: _Output, reason: FinishReason, matched: int | str | None) -> None:
        sequence = output.sequence
        output.end = OutputEnd(
            sequence.output_index, reason, matched, len(sequence.tokens) - sequence.prompt_length
        )

    def _record(self, choice: Choice, text: str) -> TokenRecord:
        candidates = tuple(
            CandidateRecord(token, self._tokenizer.decode([token], skip_special=False), logprob)
            for token, logprob in choice.candidates
        )
        return TokenRecord(choice.token, text, choice.logprob, choice.rank, candidates)

    def _take_prompt(self) -> tuple[TokenRecord, ...]:
        """Records of the scored prompt tokens, once all are there."""
        if self._prompt_sent or self.next_scored is not None:
            return ()
        self._prompt_sent = True
        choices = list(self._prompt_choices)
        if self.request.logprobs_from == 1:  # nothing comes before the first token
            choices.insert(0, Choice(self.request.prompt[0]))
        decode = self._tokenizer.decode
        return tuple(self._record(c, decode([c.token], skip_special=False)) for c in choices)

    def _finished(self, now: float) -> Finished:
        ends = tuple(output.end for output in self._outputs if output.end is not None)
        usage = Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.sequences[0].cached,
            completion_tokens=sum(end.completion_tokens for end in ends),
            preemptions=sum(sequence.preemptions for sequence in self.sequences),
        )
        timings = Timings(
            queued=self._started - self._arrived,
            first_token=self._first_token - self._arrived,
            total=now - self._arrived,
        )
        return Finished(ends, usage, timings)
