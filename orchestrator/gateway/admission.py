"""Who is let through to a worker, and who waits: one bounded queue in front of the whole fleet.

Asks wait here and not at the workers, because here they can still go to whichever worker becomes
free, in order of priority, and be refused while refusing is cheap. Lives on the gateway's loop.
"""

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ...worker.errors import DeadlineExceeded, Overloaded, Unavailable
from ..config import GatewayConfig
from ..routing.registry import Registry, Worker, WorkerState
from ..routing.router import Wish, WorkerNotFound, candidates, choose, turn
from ..status import Failure

DEFAULT_PRIORITY = 4
SHORTEST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 30.0
LEARNING = 0.05
"""Weight of the newest answer in the fraction of their max_tokens that answers reach."""

_order = itertools.count()


@dataclass(slots=True)
class Ask:
    """One request under way."""

    wish: Wish
    remaining: Callable[[], float | None]
    """Seconds until its deadline; None without one."""
    sequences: int = 1
    answer_tokens: int = 0
    """Most tokens of its answers."""
    priority: int = DEFAULT_PRIORITY
    resume: bool = True
    session: str = ""
    prompt: bytes = b""
    """What prefix affinity goes by; empty if it is too short to matter."""
    begun: float = 0.0
    """When it went to its present worker, on the loop's clock."""
    attempts: int = 0
    """Since its caller last heard something."""
    failure: Failure | None = None
    """The last one; RESOURCE_EXHAUSTED stays, because it tells the caller most."""
    patience_ends: float | None = None
    """Until when it waits for a worker to serve, on the loop's clock."""


@dataclass(slots=True, eq=False)
class _Waiter:
    ask: Ask
    placed: "asyncio.Future[Worker]"
    order: int = field(default_factory=lambda: next(_order))

    @property
    def rank(self) -> tuple[int, int]:
        return -self.ask.priority, self.order


class Admission:
    """Gives asks their workers; `release` what `place` has given."""

    def __init__(self, registry: Registry, config: GatewayConfig) -> None:
        self.rejections = 0
        self._registry = registry
        self._config = config
        self._waiters: list[_Waiter] = []
        """In the order in which they are to be placed."""
        self._fill = 1.0

    @property
    def queued(self) -> int:
        """Asks that wait."""
        return len(self._waiters)

    @property
    def load(self) -> float:
        """Sequences open or waiting over what the serving workers can run, 0 if that is unknown."""
        workers = [w for w in self._registry.workers.values() if w.state is WorkerState.SERVING]
        room = sum(worker.max_sequences for worker in workers)
        waiting = sum(waiter.ask.sequences for waiter in self._waiters)
        return (sum(w.open_sequences for w in workers) + waiting) / room if room else 0.0

    async def place(self, ask: Ask) -> Worker:
        """The ask's worker, its share of it taken.

        Raises:
            Overloaded: the queue is full, or the ask's turn would come after its deadline.
            Unavailable: nobody serves and nobody is coming back in time.
            WorkerNotFound: no worker ever fits.
            Failure: it has been tried everywhere; what it failed with last.
        """
        if not self._waiters:
            worker = self._choose(ask)
            if worker is not None:
                return self._take(ask, worker)
        ask.wish.draw = ask.wish.draw or random.random()
        waiter = self._enter(ask)
        try:
            self.changed()
            while not waiter.placed.done():
                patience = self._patience(ask)
                await asyncio.wait((waiter.placed,), timeout=patience)
            return waiter.placed.result()
        except asyncio.CancelledError:
            if waiter.placed.done() and not waiter.placed.cancelled():
                if waiter.placed.exception() is None:
                    self.release(ask, waiter.placed.result())
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def release(self, ask: Ask, worker: Worker, *, answered: int | None = None) -> None:
        """The ask has left the worker; `answered` tokens were made if it ended well."""
        worker.open_requests -= 1
        worker.open_sequences -= ask.sequences
        worker.open_tokens -= ask.wish.tokens
        worker.known_tokens -= ask.wish.known_at(worker)
        if answered is not None and ask.answer_tokens:
            self._fill += LEARNING * (min(1.0, answered / ask.answer_tokens) - self._fill)
        if self._waiters:
            self.changed()

    def changed(self) -> None:
        """A worker has changed or has room: places whom it can, in order."""
        for waiter in tuple(self._waiters):
            if not any(w.has_room for w in self._registry.workers.values()):
                return
            if waiter.placed.done():
                continue
            if self._comes_too_late(waiter.ask, wait=0.0):
                self._waiters.remove(waiter)
                waiter.placed.set_exception(self._refusal("no time is left to answer it"))
                continue
            try:
                worker = self._choose(waiter.ask)
            except WorkerNotFound as error:  # who was still to say what it runs has said so
                self._waiters.remove(waiter)
                waiter.placed.set_exception(error)
                continue
            if worker is not None:
                self._waiters.remove(waiter)
                waiter.placed.set_result(self._take(waiter.ask, worker))

    def _choose(self, ask: Ask) -> Worker | None:
        now = asyncio.get_running_loop().time()
        return choose(self._registry.workers.values(), ask.wish, now)

    def _take(self, ask: Ask, worker: Worker) -> Worker:
        worker.open_requests += 1
        worker.open_sequences += ask.sequences
        worker.open_tokens += ask.wish.tokens
        worker.known_tokens += ask.wish.known_at(worker)
        worker.breaker.begin()
        ask.begun = asyncio.get_running_loop().time()
        ask.attempts += 1
        ask.wish.tried.add(turn(worker))
        return worker

    def _patience(self, ask: Ask) -> float | None:
        """How long to wait before looking again; raises if waiting is in vain."""
        able = candidates(self._registry.workers.values(), ask.wish)
        untried = [w for w in able if turn(w) not in ask.wish.tried]
        remaining = ask.remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the deadline passed while the ask was waiting for a worker")
        if any(worker.state is WorkerState.SERVING for worker in untried):
            return min(1.0, remaining or 1.0)  # for room, or for a breaker to close
        now = asyncio.get_running_loop().time()
        if ask.patience_ends is None:
            ask.patience_ends = now + self._config.wait_for_worker_seconds
        left = ask.patience_ends - now
        overloaded = ask.failure is not None and ask.failure.is_overload
        if left <= 0 or overloaded or not any(worker.may_come_back for worker in able):
            raise ask.failure or Unavailable(_nobody_serves(able))
        return left

    def _enter(self, ask: Ask) -> _Waiter:
        waiter = _Waiter(ask, asyncio.get_running_loop().create_future())
        ahead = [other for other in self._waiters if other.rank < waiter.rank]
        self._check_deadline(ask, ahead)
        self._make_room(ask)
        self._waiters.append(waiter)
        self._waiters.sort(key=lambda each: each.rank)
        return waiter

    def _check_deadline(self, ask: Ask, ahead: list[_Waiter]) -> None:
        """Refuses at once what could only come too late."""
        wait = self._wait_seconds(ahead)
        if ahead and self._comes_too_late(ask, wait):
            raise self._refusal(f"its turn comes in about {wait:.1f} s, too late for its deadline")

    def _comes_too_late(self, ask: Ask, wait: float) -> bool:
        """Whether a whole answer could not be there by the deadline, as things look."""
        remaining = ask.remaining()
        if remaining is None:
            return False
        workers = self._registry.workers.values()
        speeds = [w.speed for w in workers if w.speed and w.state is WorkerState.SERVING]
        longest = ask.answer_tokens / ask.sequences * self._fill
        return wait + (longest / max(speeds) if speeds else 0.0) > remaining

    def _make_room(self, ask: Ask) -> None:
        """Refuses this ask, or one of lower priority, if the queue is full."""
        limits = self._config
        while (
            len(self._waiters) >= limits.max_queued_requests
            or sum(w.ask.wish.tokens for w in self._waiters) > limits.max_queued_tokens
        ):
            last = self._waiters[-1] if self._waiters else None
            if last is None or last.ask.priority >= ask.priority:
                raise self._refusal("the queue of the fleet is full")
            self._waiters.remove(last)
            refusal = self._refusal("an ask of higher priority has taken its place in the queue")
            last.placed.set_exception(refusal)

    def _refusal(self, reason: str) -> Overloaded:
        self.rejections += 1
        wait = self._wait_seconds(self._waiters)
        retry = min(max(wait, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
        return Overloaded(f"{reason}; try again in {retry:.1f} s", retry_after=retry)

    def _wait_seconds(self, ahead: list[_Waiter]) -> float:
        """How long the fleet needs for these asks, at its present speed; 0 if that is unknown."""
        rate = sum(worker.tokens_per_second for worker in self._registry.workers.values())
        tokens = sum(waiter.ask.answer_tokens for waiter in ahead) * self._fill
        return tokens / rate if rate else 0.0


def _nobody_serves(able: list[Worker]) -> str:
    states = (f"{w.name} {w.state.name.lower()}: {w.reason}" for w in able[:8])
    return f"no worker serves now ({'; '.join(states)}); try again later"
