"""The engine: one thread that schedules, runs, samples and commits until it is closed.

    with Engine("path/to/checkpoint") as engine:
        print(engine.generate("Once upon a time", max_tokens=32).text)

Callers talk to it through one queue of commands and get events back through their request's sink,
so nothing else ever touches the scheduler or the model. What it gives up: the next step is not
scheduled while the present one runs.
"""

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from .batch import Chunk
from .config import EngineConfig
from .draws import split_mix
from .errors import (
    Cancelled,
    ConclaveError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from .load import Load, Meter
from .loading import Progress, load_model
from .requests.answer import Answer
from .requests.completion import Completion, Score, Stream
from .requests.events import Event, Failed, Request
from .requests.intake import Intake, Limits, Prompt
from .sampler import sample, score
from .scheduling.cache import BlockManager
from .scheduling.scheduler import Scheduler, Share
from .scheduling.sequence import Sequence

log = logging.getLogger(__name__)


class Engine:
    """A loaded model that answers many requests at once.

    Args:
        config: the settings, or just the checkpoint's folder.
        progress: called with tensors loaded so far and in all.
        settings: fields of EngineConfig, when `config` is a folder.

    Raises:
        CheckpointError, ConfigError: see `load_model`.
    """

    def __init__(
        self,
        config: EngineConfig | Path | str,
        progress: Progress | None = None,
        **settings: object,
    ) -> None:
        if not isinstance(config, EngineConfig):
            config = EngineConfig.model_validate({"model": config, **settings})
        elif settings:
            raise TypeError("give an EngineConfig or single settings, not both")
        self.config = config
        self.model = load_model(config, progress)
        blocks = BlockManager(
            self.model.windows, self.model.cache.blocks, config.block_size, config.prefix_cache
        )
        self._scheduler = Scheduler(blocks, config.max_sequences, config.max_step_tokens)
        limits = Limits.of(config, self.model.vocabulary, self.model.cache.max_context)
        self.intake = Intake(self.model.tokenizer, limits)
        self.load = Load(pools=blocks.use())
        """State after the last step; safe to read from any thread."""
        self.last_step = time.monotonic()
        """When the engine's thread last showed life, on the clock of time.monotonic()."""
        self._meter = Meter()
        self._answers: dict[str, Answer] = {}
        self._outbox: list[tuple[Answer, Items[Event]]] = []
        self._arrivals = 0
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._admission = threading.Lock()
        self._open: dict[str, int] = {}  # sequences of each request, from submit to its last event
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests; False once closed or broken."""
        return not self._closed

    def generate(self, prompt: Prompt, **sampling: object) -> Completion:
        """Answer a prompt and wait for the whole answer.

        Args:
            prompt: text, token ids, or chat messages.
            sampling: fields of SamplingParams.

        Raises:
            ConclaveError: the request was refused or broke.
        """
        return self.stream(prompt, **sampling).result()

    def stream(self, prompt: Prompt, **sampling: object) -> Stream:
        """Answer a prompt token by token; close the stream early to cancel."""
        ids = self.intake.encode(prompt)
        stream = Stream(lambda: self.abort(request.id))
        request = self.intake.generation(ids, sampling, stream.put)
        self.submit(request)
        return stream

    def score(self, context: Prompt, continuations: Items[str | Items[int]]) -> list[Score]:
        """Log-likelihood of each continuation after the context (which may be empty ids)."""
        start = self.intake.encode(context)
        streams = []
        for continuation in continuations:
            stream = Stream(lambda: None)
            self.submit(self.intake.scoring(start, self._continue(continuation), stream.put))
            streams.append(stream)
        return [Score.of(stream.result().prompt_tokens) for stream in streams]

    def submit(self, request: Request) -> None:
        """Queue a request made by `intake`; events go to its sink.

        Raises:
            Overloaded: the queue is full.
            Unavailable: the engine is closed.
            InvalidRequest: a request with this id is open.
        """
        count = request.sampling.n
        with self._admission:
            if self._closed:
                raise Unavailable("the engine is closed")
            room = self.config.max_waiting + self.config.max_sequences
            if sum(self._open.values()) + count > room:
                raise Overloaded(f"the queue is full ({room} sequences are open)", retry_after=1.0)
            if request.id in self._open:
                raise InvalidRequest.of("request_id", f"{request.id!r} is already running")
            self._open[request.id] = count
            arrived = time.monotonic()
            self._commands.put(lambda: self._accept(request, arrived))

    def abort(self, request_id: str, error: ConclaveError | None = None) -> None:
        """End a request before the next step; its blocks are free by then. Unknown ids are fine."""
        failure = error or Cancelled("the caller gave the request up")
        self._commands.put(lambda: self._fail(request_id, failure))

    def warm_up(self) -> None:
        """Run one short generation, so that the first caller does not pay for first-time work."""
        room = min(self.config.max_step_tokens + 1, self.intake.limits.max_context - 2)
        self.generate([0] * max(1, room), max_tokens=2, temperature=0.0, ignore_eos=True)

    def close(self) -> None:
        """Stop the thread; open requests end with Unavailable."""
        with self._admission:
            if self._closed:
                return
            self._closed = True
        self._commands.put(lambda: None)  # wakes the thread up
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _continue(self, continuation: str | Items[int]) -> list[int]:
        if isinstance(continuation, str):
            return self.model.tokenizer.encode(continuation, special=False)
        return self.intake.encode(continuation)

    def _loop(self) -> None:
        try:
            while not self._closed:
                self._obey(wait=not (self._scheduler.running or self._scheduler.waiting))
                self._expire()
                shares = self._scheduler.schedule()
                if shares:
                    self._step(shares)
                self._deliver()
        except Exception:
            log.exception("the engine broke; it takes no more requests")
        with self._admission:
            self._closed = True
        self._obey(wait=False)
        for request_id in list(self._answers):
            self._fail(request_id, Unavailable("the engine was closed"))
        self._deliver()

    def _obey(self, wait: bool) -> None:
        """Run all commands that are there; `wait` for one if there is nothing to compute."""
        self.last_step = time.monotonic()
        if wait:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()
        self.last_step = time.monotonic()

    def _accept(self, request: Request, arrived: float) -> None:
        sampling, length = request.sampling, len(request.prompt)
        room = self.intake.limits.max_context - length
        most = room if sampling.max_tokens is None else sampling.max_tokens
        base = secrets.randbits(64) if sampling.seed is None else sampling.seed
        sequences: list[Sequence] = []
        for index in range(sampling.n):
            sequence = Sequence(
                request_id=request.id,
                output_index=index,
                tokens=list(request.prompt),
                prompt_length=length,
                max_length=length + most,
                sampling=sampling,
                seed=base if index == 0 else split_mix(base + index),
                arrival=self._arrivals,
                logprobs_from=request.logprobs_from if index == 0 else None,
                leader=sequences[0] if sequences else None,
            )
            self._arrivals += 1
            sequences.append(sequence)
            self._scheduler.add(sequence)
        tokenizer = self.model.tokenizer
        own = () if sampling.ignore_eos else tokenizer.stop_ids
        stop_ids = frozenset((*own, *sampling.stop_token_ids))
        self._answers[request.id] = Answer(request, sequences, tokenizer, stop_ids, arrived)
        self._meter.prompt_tokens += length

    def _expire(self) -> None:
        now = time.monotonic()
        late = [
            request_id
            for request_id, answer in self._answers.items()
            if answer.request.deadline is not None and answer.request.deadline <= now
        ]
        for request_id in late:
            self._fail(request_id, DeadlineExceeded("the request's deadline has passed"))

    def _fail(self, request_id: str, error: ConclaveError) -> None:
        """The one way out for requests that do not end well."""
        answer = self._answers.get(request_id)
        if answer is not None:
            self._forget(answer)
            self._outbox.append((answer, [Failed(error)]))

    def _forget(self, answer: Answer) -> None:
        for sequence in answer.sequences:
            self._scheduler.finish(sequence)
        del self._answers[answer.request.id]
        with self._admission:
            del self._open[answer.request.id]

    def _step(self, shares: Items[Share]) -> None:
        now = time.monotonic()
        for share in shares:
            self._answers[share.sequence.request_id].start(now)
        chunks = [self._chunk(share) for share in shares]
        try:
            logits = self.model.runner.forward(chunks)[:, : self.model.vocabulary]
        except Exception as error:
            # One step's requests are lost; the engine goes on with the others.
            log.exception("the model failed in a step of %d sequences", len(shares))
            for share in shares:
                self._fail(share.sequence.request_id, Unavailable(f"the model failed: {error}"))
            return
        self._commit(shares, chunks, logits)

    def _chunk(self, share: Share) -> Chunk:
        sequence, start = share.sequence, share.sequence.computed
        end = start + share.count
        logits = int(end == len(sequence.tokens) and not sequence.scores_only)
        scored = self._first_scored(sequence, start, end)
        if scored is not None:
            logits = end - scored
        return Chunk(sequence.tokens[start:end], start, sequence.tables, logits)

    def _first_scored(self, sequence: Sequence, start: int, end: int) -> int | None:
        """The first position in [start, end) whose logits score a wanted prompt token."""
        wanted = None
        if sequence.logprobs_from is not None:
            wanted = self._answers[sequence.request_id].next_scored
        if wanted is None or wanted > min(end, sequence.prompt_length - 1):
            return None
        assert start < wanted, "a wanted prompt position was skipped"
        return wanted - 1

    def _commit(self, shares: Items[Share], chunks: Items[Chunk], logits: Tensor) -> None:
        sampled: list[tuple[Sequence, int]] = []
        row = 0
        for share, chunk in zip(shares, chunks, strict=True):
            sequence = share.sequence
            self._score_prompt(sequence, chunk, logits[row : row + chunk.logits])
            row += chunk.logits
            self._scheduler.commit(share)
            if sequence.remaining == 0 and not sequence.scores_only:
                sampled.append((sequence, row - 1))
        if sampled:
            self._sample(sampled, logits)
        self._meter.step(time.monotonic(), len(sampled))
        self._collect({share.sequence.request_id for share in shares})

    def _score_prompt(self, sequence: Sequence, chunk: Chunk, logits: Tensor) -> None:
        end = chunk.start + len(chunk.tokens)
        position = self._first_scored(sequence, chunk.start, end)
        if position is None:
            return
        targets = sequence.tokens[position + 1 : min(end + 1, sequence.prompt_length)]
        counts = [sequence.sampling.prompt_logprobs or 0] * len(targets)
        choices = score(logits[: len(targets)], targets, counts)
        self._answers[sequence.request_id].score_prompt(choices)

    def _sample(self, sampled: Items[tuple[Sequence, int]], logits: Tensor) -> None:
        sequences = [sequence for sequence, _ in sampled]
        rows = [row for _, row in sampled]
        if len(rows) < logits.shape[0]:
            logits = logits[rows]
        choices = sample(logits, sequences, [self._forbidden(s) for s in sequences])
        now = time.monotonic()
        for sequence, choice in zip(sequences, choices, strict=True):
            answer = self._answers.get(sequence.request_id)
            if answer is None:  # another output of this request has just failed
                continue
            if choice is None:
                error = Unavailable("the model produced NaN; its weights or kernels are broken")
                self._fail(sequence.request_id, error)
            elif answer.accept(sequence, choice, now):
                self._scheduler.finish(sequence)

    def _forbidden(self, sequence: Sequence) -> Items[int]:
        """Tokens that must not come next."""
        suppressed = self.model.tokenizer.suppressed_ids
        if sequence.answer_length >= sequence.sampling.min_tokens:
            return suppressed
        return [*suppressed, *self._answers[sequence.request_id].stop_ids]

    def _collect(self, request_ids: set[str]) -> None:
        """Collect what the step brought to each request; let finished requests go."""
        now = time.monotonic()
        for request_id in request_ids:
            answer = self._answers.get(request_id)
            if answer is None:
                continue
            leader = answer.sequences[0]
            if leader.scores_only and leader.computed == leader.prompt_length:
                answer.end_scoring(now)
            events = answer.take_events(now)
            if answer.finished:
                self._meter.cached_tokens += leader.cached
                self._forget(answer)
            if events:
                self._outbox.append((answer, events))

    def _deliver(self) -> None:
        """Publish the state, then send what has happened: who hears of it sees no older state."""
        self._publish()
        for answer, events in self._outbox:
            answer.request.sink(events)
        self._outbox.clear()

    def _publish(self) -> None:
        scheduler, meter = self._scheduler, self._meter
        open_sequences = (*scheduler.running, *scheduler.waiting)
        self.load = Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            outstanding_tokens=sum(s.max_length - s.computed for s in open_sequences),
            pools=scheduler.blocks.use(),
            prompt_tokens=meter.prompt_tokens,
            cached_tokens=meter.cached_tokens,
            completion_tokens=meter.completion_tokens,
            preemptions=scheduler.preemptions,
            steps=meter.steps,
            tokens_per_second=meter.rate(self.last_step),
        )
