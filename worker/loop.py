"""What the engine's thread does, turn by turn: schedule, run, sample, commit, tell.

Nothing here is safe to use from a second thread, and nothing has to be: callers reach it through
the engine's queue of commands. What it gives up: the next step is not scheduled while the present
one runs.
"""

import itertools
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from .config import EngineConfig
from .errors import ConclaveError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from .load import STALE, Load, Meter
from .loading import LoadedModel
from .memory.experts.cache import ExpertUse
from .requests.answer import Answer, start_sequences
from .requests.events import Event, Failed, Request
from .requests.stepping import StepAnswer
from .running.batch import Chunk
from .running.caches import NarrowCaches, NarrowUse
from .running.sampler import likeliest, sample, score
from .scheduling.cache import BlockManager
from .scheduling.scheduler import Scheduler, Share
from .scheduling.sequence import Sequence, State

log = logging.getLogger(__name__)


class EngineLoop:
    """The requests on their way through one loaded model.

    Args:
        model: runs them.
        config: how they are batched.
        gone: told the id of each request that has left.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig, gone: Callable[[str], None]
    ) -> None:
        blocks = BlockManager(
            *(model.windows, model.cache.blocks, config.block_size, config.prefix_cache),
            host=model.cache.host,
        )
        self.scheduler = Scheduler(blocks, config.max_sequences, config.max_step_tokens)
        self._model = model
        self._config = config
        self._gone = gone
        self._meter = Meter()
        self._answers: dict[str, Answer] = {}
        self._logits: dict[str, Tensor] = {}  # of stepped answers that know their distribution
        self._outbox: list[tuple[Answer, Items[Event]]] = []
        self._arrivals = itertools.count()
        self._narrow: tuple[NarrowUse, ...] = ()
        self._narrow_until = 0.0
        self._experts: ExpertUse | None = None
        self._experts_until = 0.0
        self._stuck = False  # nothing could be scheduled in the last turn

    def turn(self) -> None:
        """Make one step, if there is anything to compute, and send what has happened."""
        now = time.monotonic()
        self._expire(now)
        shares = self.scheduler.schedule(now)
        self._stuck = not shares
        if shares:
            self._step(shares, now)

    def pause(self) -> float | None:
        """Seconds until there is something to do without a command; None if there never is."""
        scheduler = self.scheduler
        if scheduler.running or (scheduler.waiting and not self._stuck):
            return 0.0
        deadlines = (answer.request.deadline for answer in self._answers.values())
        times = [t for t in (scheduler.patience_ends, *deadlines) if t is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def accept(self, request: Request, arrived: float) -> None:
        """Take a request on."""
        sequences = start_sequences(request, self._arrivals)
        kind = Answer if request.steps is None else StepAnswer
        answer = kind(request, sequences, self._model.tokenizer, arrived)
        self._answers[request.id] = answer
        self._meter.prompt_tokens += len(request.prompt)
        for sequence in sequences:
            if sequence.state is State.WAITING:
                self.scheduler.add(sequence)
        if answer.finished:  # by what was made of it
            self._collect([request.id])

    def take(self, request_id: str, ids: Items[int], generate: int) -> None:
        """Begin a step of a stepped answer; one that has ended meanwhile has told so already."""
        answer = self._answers.get(request_id)
        if answer is None:
            return
        assert isinstance(answer, StepAnswer)
        logits = self._logits.pop(request_id, None)
        first = None
        wanted = answer.request.sampling.logprobs
        if ids and logits is not None and wanted is not None:
            (first,) = score(logits, ids[:1], [wanted])
        try:
            answer.take(ids, generate, first)
        except InvalidRequest as error:
            self.fail(request_id, error)
            return
        if not ids and logits is not None:
            self._choose([(answer.sequence, 0)], logits)
        self._collect([request_id])

    def fail(self, request_id: str, error: ConclaveError, sound: bool = True) -> None:
        """The one way out for requests that do not end well; unknown ids are fine.

        Args:
            request_id: who goes.
            error: what its caller is told.
            sound: False if what it has computed must not be read by others.
        """
        answer = self._answers.get(request_id)
        if answer is not None:
            self._forget(answer, sound)
            self._outbox.append((answer, [Failed(error)]))

    def fail_all(self, error: ConclaveError) -> None:
        """End every request."""
        for request_id in list(self._answers):
            self.fail(request_id, error)

    def deliver(self) -> None:
        """Send what has happened."""
        for answer, events in self._outbox:
            answer.request.sink(events)
        self._outbox.clear()

    def state(self) -> Load:
        """How busy the engine is now."""
        scheduler, meter, stream = self.scheduler, self._meter, self._model.runner.stream
        sequences = (s for answer in self._answers.values() for s in answer.sequences)
        present = [s for s in sequences if s.state is not State.FINISHED]
        return Load(
            running=len(present) - len(scheduler.waiting),
            waiting=len(scheduler.waiting),
            parked=sum(s.state is State.PARKED for s in present),
            outstanding_tokens=sum(s.max_length - s.computed for s in present),
            pools=scheduler.blocks.use(),
            host=scheduler.blocks.host_use(),
            prompt_tokens=meter.prompt_tokens,
            cached_tokens=meter.cached_tokens,
            completion_tokens=meter.completion_tokens,
            preemptions=scheduler.preemptions,
            steps=meter.steps,
            tokens_per_second=meter.rate(time.monotonic()),
            narrow=self._narrow_use(),
            stream=None if stream is None else stream.use(),
            experts=self._expert_use(),
        )

    def _narrow_use(self) -> tuple[NarrowUse, ...]:
        """Asks the device, which takes a while, now and then."""
        caches, now = self._model.runner.caches, time.monotonic()
        if isinstance(caches, NarrowCaches) and now >= self._narrow_until:
            self._narrow, self._narrow_until = caches.use(), now + STALE
        return self._narrow

    def _expert_use(self) -> ExpertUse | None:
        """Asks the device now and then, too."""
        experts, now = self._model.runner.experts, time.monotonic()
        if experts is not None and now >= self._experts_until:
            self._experts, self._experts_until = experts.use(), now + STALE
        return self._experts

    def _expire(self, now: float) -> None:
        late = [
            request_id
            for request_id, answer in self._answers.items()
            if answer.request.deadline is not None and answer.request.deadline <= now
        ]
        for request_id in late:
            self.fail(request_id, DeadlineExceeded("the request's deadline has passed"))

    def _forget(self, answer: Answer, sound: bool = True) -> None:
        for sequence in answer.sequences:
            self.scheduler.finish(sequence, sound)
        del self._answers[answer.request.id]
        self._logits.pop(answer.request.id, None)
        self._gone(answer.request.id)

    def _step(self, shares: Items[Share], now: float) -> None:
        for share in shares:
            self._answers[share.sequence.request_id].start(now)
        chunks = [self._chunk(share) for share in shares]
        runner, blocks = self._model.runner, self.scheduler.blocks
        runner.renew(blocks.take_renewed())
        runner.wipe(blocks.take_soiled())
        if runner.host is not None:  # now, as what comes may come into a block that was wiped
            runner.host.exchange(blocks.take_moves(), wait=not self.scheduler.arriving)
        try:
            logits = runner.forward(chunks)[:, : self._model.vocabulary]
        except torch.OutOfMemoryError as error:
            self._lighten([share.sequence for share in shares], error)
            return
        except Exception as error:
            # One step's requests are lost; the engine goes on with the others.
            log.exception("the model failed in a step of %d sequences", len(shares))
            for share in shares:
                failure = Unavailable(f"the model failed: {error}")
                self.fail(share.sequence.request_id, failure, sound=False)
            return
        for number in runner.broken:  # before its blocks are known to the prefix cache
            self._break(shares[number].sequence)
        if runner.overfull:
            self._make_room([shares[number].sequence for number in runner.overfull])
        self._commit(shares, chunks, logits)

    def _break(self, sequence: Sequence) -> None:
        error = Unavailable("the model produced NaN; its weights or kernels are broken")
        self.fail(sequence.request_id, error, sound=False)

    def _lighten(self, sequences: Items[Sequence], error: torch.OutOfMemoryError) -> None:
        """Run fewer at once, as another process has taken memory; one that was alone is refused."""
        log.warning("no memory for a step of %d sequences: %s", len(sequences), error)
        if len(sequences) > 1:
            # Rows that the step took of a narrow cache come back with blocks that are given up. Who
            # went on would store the same tokens again, with rows once more.
            narrow = isinstance(self._model.runner.caches, NarrowCaches)
            self.scheduler.give_way(sequences[0 if narrow else (len(sequences) + 1) // 2 :])
            return
        failure = Overloaded(
            "the device has too little memory left for one step, since something else uses it: end "
            "that, or lower max_step_tokens, the KV cache or knobs.memory_budget",
            retry_after=1.0,
        )
        self.fail(sequences[0].request_id, failure)

    def _make_room(self, overfull: Items[Sequence]) -> None:
        """Compute sequences again whose keys or values could not be stored within their error.

        Then with fewer beside them, and without the prefix cache. One that was alone is refused.
        """
        blocks = self.scheduler.blocks
        alone = self.scheduler.holders == 1 and not any(pool.cached for pool in blocks.pools)
        left = [s for s in overfull if s.state is State.RUNNING]  # others have just failed
        if left and not alone:
            for sequence in left:  # or what its own windows pass would fill the pool again
                sequence.shares = False
            self.scheduler.give_way(left)
        for sequence in left if alone else ():
            error = Overloaded(
                "keys or values of this text cannot be kept within max_error "
                f"{sequence.max_error or self._config.knobs.max_error}: the pool of second digits "
                "is full with it alone, or two digits are too few; allow a larger error, or give "
                "the KV cache more memory",
                retry_after=1.0,
            )
            self.fail(sequence.request_id, error, sound=False)
        blocks.forget()

    def _chunk(self, share: Share) -> Chunk:
        sequence, start = share.sequence, share.sequence.computed
        end = start + share.count
        logits = int(end == len(sequence.tokens) and not sequence.scores_only)
        scored = self._first_scored(sequence, start, end)
        if scored is not None:
            logits = end - scored
        tokens = sequence.tokens[start:end]
        return Chunk(tokens, start, sequence.tables, logits, sequence.max_error)

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
        computed: list[tuple[Sequence, int]] = []
        row = 0
        for share, chunk in zip(shares, chunks, strict=True):
            sequence, own = share.sequence, logits[row : row + chunk.logits]
            row += chunk.logits
            if sequence.state is not State.RUNNING:  # it has just failed, or given way
                continue
            self._score_prompt(sequence, chunk, own)
            self.scheduler.commit(share)
            if sequence.remaining == 0 and not sequence.scores_only:
                computed.append((sequence, row - 1))
        made = self._choose(computed, logits)
        self._meter.step(time.monotonic(), made)
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

    def _choose(self, computed: Items[tuple[Sequence, int]], logits: Tensor) -> int:
        """Sample for those whose next token is ours to choose, tell the others' callers.

        Args:
            computed: sequences, and the row of the logits that says what comes next.
            logits: of the step.

        Returns how many tokens were sampled.
        """
        sampled: list[tuple[Sequence, int]] = []
        told: list[tuple[Sequence, int]] = []
        for sequence, row in computed:
            answer = self._answers[sequence.request_id]
            waits = isinstance(answer, StepAnswer) and not answer.chooses
            (told if waits else sampled).append((sequence, row))
        if sampled:
            self._sample([s for s, _ in sampled], _rows(logits, [row for _, row in sampled]))
        if told:
            self._tell([s for s, _ in told], _rows(logits, [row for _, row in told]))
        return len(sampled)

    def _sample(self, sequences: Items[Sequence], logits: Tensor) -> None:
        choices = sample(logits, sequences, [self._forbidden(s) for s in sequences])
        now = time.monotonic()
        for sequence, choice in zip(sequences, choices, strict=True):
            answer = self._answers.get(sequence.request_id)
            if answer is None:  # another output of this request has just failed
                continue
            if choice is None:
                self._break(sequence)
            elif answer.accept(sequence, choice, now):
                self.scheduler.finish(sequence)

    def _tell(self, sequences: Items[Sequence], logits: Tensor) -> None:
        """Give stepped answers their distribution, and keep it: the next step may sample of it."""
        answers = [self._answers[sequence.request_id] for sequence in sequences]
        stepped = [answer for answer in answers if isinstance(answer, StepAnswer)]
        tables = likeliest(logits, [answer.candidates for answer in stepped])
        for row, (answer, table) in enumerate(zip(stepped, tables, strict=True)):
            if table is None:
                self._break(answer.sequence)
            else:
                answer.tell(table)
                self._logits[answer.request.id] = logits[row : row + 1].clone()

    def _forbidden(self, sequence: Sequence) -> Items[int]:
        """Tokens that must not come next."""
        suppressed = self._model.tokenizer.suppressed_ids
        if sequence.answer_length >= sequence.sampling.min_tokens:
            return suppressed
        return [*suppressed, *self._answers[sequence.request_id].request.stop_ids]

    def _collect(self, request_ids: Items[str] | set[str]) -> None:
        """Collect what the step brought to each request; let finished requests go."""
        now = time.monotonic()
        for request_id in request_ids:
            answer = self._answers.get(request_id)
            if answer is None:
                continue
            leader = answer.sequences[0] if answer.sequences else None
            if leader and leader.scores_only and leader.computed == leader.prompt_length:
                answer.end_scoring(now)
            events = answer.take_events(now)
            if answer.finished:
                self._meter.cached_tokens += answer.cached_tokens
                self._forget(answer)
            elif isinstance(answer, StepAnswer):
                self._park_or_wake(answer, now)
            if events:
                self._outbox.append((answer, events))

    def _park_or_wake(self, answer: StepAnswer, now: float) -> None:
        """A stepped sequence is scheduled exactly while it owes a response."""
        state = answer.sequence.state
        if state is State.PARKED and answer.owes:
            self.scheduler.wake(answer.sequence)
        elif state is State.RUNNING and not answer.owes:
            self.scheduler.park(answer.sequence, now)


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if rows == list(range(logits.shape[0])) else logits[rows]
