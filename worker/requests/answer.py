"""A request on its way: its sequences, the text released so far, when each answer ends.

No tensors and no threads: the engine hands in chosen tokens and takes events out.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from ..draws import split_mix
from ..running.sampler import Choice
from ..scheduling.sequence import FinishReason, Sequence, State
from ..text.tokenizer import Tokenizer
from .answer_text import AnswerText
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


def output_seed(seed: int, index: int) -> int:
    """What draws the tokens of one of the n answers to a request with this seed."""
    return seed if index == 0 else split_mix(seed + index)


def start_sequences(request: Request, arrivals: Iterator[int]) -> list[Sequence]:
    """One for each output that its caller does not have whole, behind what is made of it.

    Those whose made tokens contain their end are finished; the first other one leads.
    """
    assert request.sampling.max_tokens is not None and request.sampling.seed is not None
    length = len(request.prompt)
    sequences: list[Sequence] = []
    leader = None
    for index, (made, text) in enumerate(zip(request.made, request.texts, strict=True)):
        if made.ended:
            continue
        sequence = Sequence(
            request_id=request.id,
            output_index=index,
            tokens=list(request.prompt),
            prompt_length=length,
            max_length=length + request.sampling.max_tokens,
            sampling=request.sampling,
            seed=output_seed(request.sampling.seed, index),
            arrival=next(arrivals),
            logprobs_from=request.logprobs_from if index == 0 else None,
            max_error=request.max_error,
            leader=leader,
        )
        for token in made.ids:
            sequence.append(token)
        if text.reason is None:
            leader = leader or sequence
        else:
            sequence.state = State.FINISHED
        sequences.append(sequence)
    return sequences


@dataclass(slots=True)
class _Output:
    """One of the n answers: its text and what has not been sent yet."""

    sequence: Sequence
    text: AnswerText
    unsent: list[TokenRecord] = field(default_factory=list)
    end: OutputEnd | None = None


class Answer:
    """All outputs of one request that go on.

    Args:
        request: what was asked.
        sequences: what `start_sequences` made of it.
        tokenizer: makes text of tokens.
        arrived: when the request reached the engine, on the clock of time.monotonic().
    """

    def __init__(
        self, request: Request, sequences: Items[Sequence], tokenizer: Tokenizer, arrived: float
    ) -> None:
        self.request = request
        self.sequences = tuple(sequences)
        self._tokenizer = tokenizer
        self._arrived = arrived
        self._started = 0.0
        self._first_token = 0.0
        self._outputs = {
            s.output_index: _Output(s, request.texts[s.output_index]) for s in sequences
        }
        for output in self._outputs.values():
            self._note_end(output)
        self._prompt_choices: list[Choice] = []
        self._prompt_sent = request.logprobs_from is None

    @property
    def next_scored(self) -> int | None:
        """The next prompt position whose log-probability is wanted; None if none is left."""
        start = self.request.logprobs_from
        if start is None or start + len(self._prompt_choices) >= len(self.request.prompt):
            return None
        return start + len(self._prompt_choices)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first sequence to run took from the prefix cache."""
        leading = (s.cached for s in self.sequences if s.leader is None)
        return min(max(leading, default=0), len(self.request.prompt))

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
        self._add(output, choice)
        return output.end is not None

    def end_scoring(self, now: float) -> None:
        """End a request that generates nothing."""
        self._first_token = now
        for output in self._outputs.values():
            output.end = OutputEnd(output.sequence.output_index, FinishReason.LENGTH, None, 0)

    @property
    def finished(self) -> bool:
        """Whether all outputs have ended."""
        return all(output.end is not None for output in self._outputs.values())

    def take_events(self, now: float) -> list[Event]:
        """What is new since the last call; the terminal event once all outputs have ended."""
        finished = self.finished
        if self.request.whole and not finished:
            return []
        events: list[Event] = []
        for output in self._outputs.values():
            prompt = self._take_prompt() if output.sequence.output_index == 0 else ()
            if output.unsent or prompt:
                events.append(Delta(output.sequence.output_index, tuple(output.unsent), prompt))
                output.unsent.clear()
        if finished:
            events.append(self._finished(now))
        return events

    def _add(self, output: _Output, choice: Choice) -> None:
        output.sequence.append(choice.token)
        output.unsent.append(self._record(choice, output.text.push(choice.token)))
        self._note_end(output)

    def _note_end(self, output: _Output) -> None:
        text, index = output.text, output.sequence.output_index
        if text.reason is not None:
            output.end = OutputEnd(index, text.reason, text.matched, text.length)

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
        ends = tuple(output.end for output in self._outputs.values() if output.end is not None)
        elsewhere = sum(len(made.ids) for made in self.request.made if made.ended)
        usage = Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            completion_tokens=elsewhere + sum(end.completion_tokens for end in ends),
            preemptions=sum(sequence.preemptions for sequence in self.sequences),
        )
        timings = Timings(
            queued=(self._started or now) - self._arrived,
            first_token=(self._first_token or now) - self._arrived,
            total=now - self._arrived,
        )
        return Finished(ends, usage, timings)
