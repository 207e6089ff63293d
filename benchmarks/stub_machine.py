"""The engine of a stub worker: made-up tokens in steps of a set length, no model. No clock, no I/O.

A token is a function of the weights' name, the prompt, the seed, the output and the index alone, so
the whole truth about an answer is known beforehand, also of one that moved between workers. As in a
real engine, a step gives every running sequence its next token, and takes the longer the more run.
"""

import math
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256

from google.rpc import code_pb2

from conclave.protos import generation_pb2 as pb
from conclave.protos import worker_pb2

from .stub_cache import StubCache

VOCABULARY = 512
EOS = 1
MAX_CONTEXT = 8192
MAX_OUTPUTS = 16
WEIGHTS = "stub-weights"
DEFAULT_TOKENS = 256
BLOCK = 16
"""Tokens in a block of the cache that is only counted here."""
TOKEN_BYTES = 4
"""Of a prompt: here its size alone says how many tokens it has."""
_MASK = 2**64 - 1
_TOKENS = [pb.Token(id=number, text=f"{number} ") for number in range(VOCABULARY)]


class Refusal(Exception):
    """A request ends with a status, or with a failed event if it has begun."""

    def __init__(
        self, code: int, message: str, *, field: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        """With INVALID_ARGUMENT: what is wrong."""
        self.retry_after = retry_after


Told = pb.GenerateResponse | Refusal
Sink = Callable[[Told], None]
"""Takes a request's events; the last one is a finished or failed event, or a refusal."""


def key_of(prompt: pb.Prompt, seed: int, weights: str) -> int:
    """What all tokens of an answer follow from."""
    message = prompt.SerializeToString(deterministic=True)
    return int.from_bytes(sha256(b"%d|%s|%s" % (seed, weights.encode(), message)).digest()[:8])


def token_at(key: int, index: int) -> int:
    """The token id at a place of an answer: SplitMix64's output function."""
    mixed = (key + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return (mixed ^ (mixed >> 31)) % VOCABULARY


def truth(request: pb.GenerateRequest, output: int, weights: str) -> list[int]:
    """All token ids of one answer, if nothing goes wrong. Greedy, or with a seed."""
    sequence = Sequence.of(request, output, weights, start=0)
    ids: list[int] = []
    while sequence.reason is None:
        ids.append(sequence.next())
    return ids


@dataclass(slots=True)
class Sequence:
    """One of a request's answers."""

    output: int
    key: int
    position: int
    """Tokens that it has, made ones included."""
    limit: int
    shortest: int
    stops: frozenset[int]
    reason: "pb.FinishReason | None" = None
    stopped_by: int | None = None

    @classmethod
    def of(cls, request: pb.GenerateRequest, output: int, weights: str, start: int) -> "Sequence":
        """The answer number `output`, which has `start` tokens already."""
        sampling = request.sampling
        greedy = sampling.HasField("temperature") and sampling.temperature == 0
        seed = 0 if greedy else sampling.seed + 1 + (output << 64)
        sequence = cls(
            output=output,
            key=key_of(request.prompt, seed, weights),
            position=start,
            limit=sampling.max_tokens if sampling.HasField("max_tokens") else DEFAULT_TOKENS,
            shortest=sampling.min_tokens,
            stops=frozenset((*(() if sampling.ignore_eos else (EOS,)), *sampling.stop_token_ids)),
        )
        if sequence.position >= sequence.limit:
            sequence.reason = pb.FINISH_REASON_LENGTH
        return sequence

    def take(self, ids: list[int]) -> None:
        """Has got tokens that somebody else chose."""
        self.position += len(ids)
        if ids and ids[-1] in self.stops and self.position > self.shortest:
            self.reason, self.stopped_by = pb.FINISH_REASON_STOP, ids[-1]
        elif self.position >= self.limit:
            self.reason = pb.FINISH_REASON_LENGTH

    def next(self) -> int:
        """Makes one token."""
        token = token_at(self.key, self.position)
        self.position += 1
        if token in self.stops and self.position > self.shortest:
            self.reason, self.stopped_by = pb.FINISH_REASON_STOP, token
        elif self.position >= self.limit:
            self.reason = pb.FINISH_REASON_LENGTH
        return token

    def end(self) -> pb.OutputEnd:
        """How it ended."""
        return pb.OutputEnd(
            output_index=self.output,
            reason=self.reason,
            stop_token_id=self.stopped_by,
            completion_tokens=self.position,
        )


@dataclass(slots=True)
class Settings:
    """What a stub worker is and can do. The rates may be changed at any time."""

    name: str = "stub"
    model: str = "stub"
    weights: str = WEIGHTS
    """Stands for the model's fingerprint; other weights make other tokens."""
    tokenizer: str = "stub-tokenizer"
    labels: dict[str, str] = field(default_factory=dict)
    rate: float = 2000.0
    """Tokens a second over all running sequences."""
    stream_rate: float = 200.0
    """Most tokens a second of one sequence."""
    per_step: int = 1
    """Tokens that a step gives each sequence, and so tokens in one delta."""
    slots: int = 32
    """Sequences that run at once; others wait."""
    waiting: int = 1024
    """Sequences that may wait; more are refused."""
    first_token: float = 0.0
    """Seconds from a sequence's start to its first token, beside the step and the prompt."""
    prefill_rate: float = math.inf
    """Prompt tokens a second, of one prompt after the other; decoding goes on meanwhile."""
    cache_blocks: int = 0
    """Blocks of text prompts that are kept, and cost nothing when they come again. Fixed."""
    slowdown: float = 1.0


@dataclass(slots=True, eq=False)
class Job:
    """One request under way."""

    request: pb.GenerateRequest
    sink: Sink
    sequences: list[Sequence]
    ended: list[pb.OutputEnd]
    prompt_tokens: int
    arrived: float
    deadline: float | None
    cached_tokens: int = 0
    """Of its prompt, once it runs."""
    ready_at: float | None = None
    """When its first token may come; None while it waits."""
    begun: bool = False
    kept: dict[int, list[pb.Token]] = field(default_factory=dict)
    """By output, of a request that wants all in one event."""


class Machine:
    """Runs jobs step by step; its caller keeps the clock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.running: list[Job] = []
        self.queue: deque[Job] = deque()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.steps = 0
        self._cache = StubCache(settings.cache_blocks, BLOCK * TOKEN_BYTES)
        self._prefilled_at = 0.0
        """When the last prompt so far will have been computed."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.running or self.queue)

    @property
    def step_seconds(self) -> float:
        """How long a step takes now."""
        settings, running = self.settings, max(1, self._sequences(self.running))
        rate = min(settings.stream_rate, settings.rate / running)
        return settings.per_step * settings.slowdown / rate

    def submit(
        self, request: pb.GenerateRequest, sink: Sink, now: float, timeout: float | None
    ) -> Job:
        """Queues a request. Raises Refusal."""
        sequences = _checked(request, self.settings.weights)
        room = self.settings.waiting + self.settings.slots
        if self._sequences(self.running) + self._sequences(self.queue) + len(sequences) > room:
            raise Refusal(code_pb2.RESOURCE_EXHAUSTED, "the queue is full", retry_after=0.2)
        job = Job(
            request=request,
            sink=sink,
            sequences=sequences,
            ended=[],
            prompt_tokens=max(1, request.prompt.ByteSize() // TOKEN_BYTES),
            arrived=now,
            deadline=None if timeout is None else now + timeout,
        )
        self.prompt_tokens += job.prompt_tokens
        self.queue.append(job)
        return job

    def abort(self, job: Job) -> None:
        """Takes a job out; its sink hears nothing more. A no-op if it has ended."""
        if job in self.running:
            self.running.remove(job)
        elif job in self.queue:
            self.queue.remove(job)

    def fail(self, message: str) -> None:
        """Ends every running job as an engine does whose step has failed."""
        running, self.running = self.running, []
        for job in running:
            _refuse(job, Refusal(code_pb2.UNAVAILABLE, message))

    def step(self, now: float) -> None:
        """Gives every running sequence its next tokens."""
        self._expire(now)
        self._admit(now)
        self.steps += 1
        for job in list(self.running):
            if job.ready_at is not None and job.ready_at <= now:
                self._advance(job, now)

    def load(self, now: float, last_step: float, draining: bool) -> worker_pb2.GetLoadResponse:
        """How busy it is."""
        settings, running = self.settings, self._sequences(self.running)
        used = sum(_blocks(job) for job in self.running)
        everyone = (*self.running, *self.queue)
        left = sum(s.limit - s.position for job in everyone for s in job.sequences)
        left += sum(job.prompt_tokens - job.cached_tokens for job in everyone if not job.begun)
        return worker_pb2.GetLoadResponse(
            running_sequences=running,
            waiting_sequences=self._sequences(self.queue),
            outstanding_tokens=left,
            pools=[worker_pb2.BlockPool(blocks=settings.slots * 64, used=used)],
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            steps=self.steps,
            tokens_per_second=min(settings.rate, running * settings.stream_rate),
            draining=draining,
            step_age_seconds=0.0 if self.idle else now - last_step,
        )

    def _admit(self, now: float) -> None:
        taken = self._sequences(self.running)
        while self.queue and taken + len(self.queue[0].sequences) <= self.settings.slots:
            job = self.queue.popleft()
            job.ready_at = self._prefill(job, now) + self._slowed(self.settings.first_token)
            self.running.append(job)
            taken += len(job.sequences)

    def _prefill(self, job: Job, now: float) -> float:
        """When the prompt will have been computed, as far as it is not held.

        What an earlier one will leave counts as held: prompts are computed in order, so it is there
        in time. One that is given up is computed to its end.
        """
        found = self._cache.take(job.request.prompt.text.encode())
        job.cached_tokens = min(found, (job.prompt_tokens - 1) // BLOCK) * BLOCK
        self.cached_tokens += job.cached_tokens
        seconds = (job.prompt_tokens - job.cached_tokens) / self.settings.prefill_rate
        self._prefilled_at = max(now, self._prefilled_at) + self._slowed(seconds)
        return self._prefilled_at

    def _slowed(self, seconds: float) -> float:
        return seconds * self.settings.slowdown

    def _expire(self, now: float) -> None:
        for job in (*self.running, *self.queue):
            if job.deadline is not None and job.deadline <= now:
                self.abort(job)
                _refuse(job, Refusal(code_pb2.DEADLINE_EXCEEDED, "the deadline has passed"))

    def _advance(self, job: Job, now: float) -> None:
        for sequence in job.sequences:
            tokens: list[pb.Token] = []
            while sequence.reason is None and len(tokens) < self.settings.per_step:
                tokens.append(_TOKENS[sequence.next()])
            self.completion_tokens += len(tokens)
            if job.request.whole:
                job.kept.setdefault(sequence.output, []).extend(tokens)
            elif tokens:
                job.sink(_delta(job, sequence.output, tokens))
            job.begun = True
            if sequence.reason is not None:
                if kept := job.kept.pop(sequence.output, None):
                    job.sink(_delta(job, sequence.output, kept))
                job.ended.append(sequence.end())
        job.sequences = [each for each in job.sequences if each.reason is None]
        if not job.sequences:
            self.running.remove(job)
            job.sink(self._finished(job, now))

    def _finished(self, job: Job, now: float) -> pb.GenerateResponse:
        ends = sorted(job.ended, key=lambda end: end.output_index)
        finished = pb.Finished(
            outputs=ends,
            usage=pb.Usage(
                prompt_tokens=job.prompt_tokens,
                cached_tokens=job.cached_tokens,
                completion_tokens=sum(end.completion_tokens for end in ends),
            ),
            timings=pb.Timings(total=now - job.arrived),
            worker=self.settings.name,
            model=self.settings.model,
        )
        return pb.GenerateResponse(request_id=job.request.request_id, finished=finished)

    @staticmethod
    def _sequences(jobs: "list[Job] | deque[Job]") -> int:
        return sum(len(job.sequences) for job in jobs)


def _checked(request: pb.GenerateRequest, weights: str) -> list[Sequence]:
    """The sequences of a request. Raises Refusal."""
    sampling = request.sampling
    count = sampling.n if sampling.HasField("n") else 1
    if request.prompt.WhichOneof("input") is None:
        raise Refusal(code_pb2.INVALID_ARGUMENT, "prompt: is missing", field="prompt")
    if not 1 <= count <= MAX_OUTPUTS:
        raise Refusal(code_pb2.INVALID_ARGUMENT, "sampling.n: out of range", field="sampling.n")
    if sampling.max_tokens > MAX_CONTEXT:
        name = "sampling.max_tokens"
        raise Refusal(code_pb2.INVALID_ARGUMENT, f"{name}: too long", field=name)
    if not sampling.HasField("seed"):
        sampling.seed = secrets.randbits(64)
    return list(_sequences(request, count, weights))


def _sequences(request: pb.GenerateRequest, count: int, weights: str) -> Iterator[Sequence]:
    for output in range(count):
        if output >= len(request.made):
            yield Sequence.of(request, output, weights, start=0)
            continue
        made = request.made[output]
        sequence = Sequence.of(request, output, weights, start=0)
        if any(sequence.reason is not None or sequence.next() != token for token in made.ids):
            name = f"made[{output}].ids"
            message = f"{name}: is not what these weights would have made"
            raise Refusal(code_pb2.INVALID_ARGUMENT, message, field=name)
        if not made.ended:
            yield sequence


def _refuse(job: Job, refusal: Refusal) -> None:
    if not job.begun or job.request.whole:
        job.sink(refusal)
        return
    error = pb.Error(
        code=refusal.code,
        message=refusal.message,
        retryable=refusal.code == code_pb2.UNAVAILABLE,
    )
    failed = pb.Failed(error=error)
    job.sink(pb.GenerateResponse(request_id=job.request.request_id, failed=failed))


def _delta(job: Job, output: int, tokens: list[pb.Token]) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=job.request.request_id, delta=pb.Delta(output_index=output, tokens=tokens)
    )


def _blocks(job: Job) -> int:
    return sum(-(-(job.prompt_tokens + each.position) // BLOCK) for each in job.sequences)
