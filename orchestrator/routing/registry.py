"""What the gateway knows of every worker: state, address, load. Plain data, no input or output.

Two sources speak here. Ray, through the supervisor, says where a worker is and whether it lives;
the worker's own health stream says whether it serves. While the health stream is up it has the
last word: Ray learns of changes later. Owned by one thread, the gateway's event loop.

    STARTING -> SERVING -> DRAINING -> DOWN
        ^          |           |        |
        +----------+-----------+--------+   (a new incarnation)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from ...worker.precision import Precision
from .breaker import Breaker

SPEED_SHARE = 0.3
"""Weight of the newest heartbeat in a worker's observed speed."""
FADING = 0.02
"""Weight of all workers' mean in that of an idle one, at each heartbeat."""


class WorkerState(IntEnum):
    """The numbers are those of `conclave.v1.WorkerState`."""

    STARTING = 1
    SERVING = 2
    DRAINING = 3
    DOWN = 4


@dataclass(slots=True, eq=False)
class Worker:
    """One worker as the gateway sees it."""

    name: str
    model: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    state: WorkerState = WorkerState.STARTING
    address: str = ""
    incarnation: str = ""
    device: str = ""
    reason: str = ""
    """Why it is not serving; empty while it is."""
    lost: bool = False
    """Down, and nobody is going to bring it back."""
    weights: str = ""
    """Fingerprint of its checkpoint: workers with the same one give the same tokens."""
    tokenizer: str = ""
    """Fingerprint of its tokenizer."""
    precision: Precision | None = None
    """What is left of its weights; None until the present process has said so."""
    max_sequences: int = 0
    """Sequences that it runs at once; 0 if it has not said."""
    open_requests: int = 0
    open_sequences: int = 0
    open_tokens: int = 0
    """Prompt and answer tokens of our open asks."""
    known_tokens: int = 0
    """Of those, what it need not compute, as far as one knows."""
    foreign_tokens: int = 0
    """The same of other gateways' asks, by its last heartbeat."""
    speed: float = 0.0
    """Answer tokens a second of one of its streams, observed; 0 if unknown."""
    tokens_per_second: float = 0.0
    """Answer tokens a second of all its streams, by its last heartbeat."""
    breaker: Breaker = field(default_factory=Breaker)
    served_requests: int = 0
    restarts: int = 0
    process: int = 0
    """Process id on its node, 0 if unknown."""
    epoch: int = 0
    """How often it turned to SERVING; an ask that failed in an earlier epoch may try again."""

    @property
    def outstanding_tokens(self) -> int:
        """Work that it has not done yet, in tokens."""
        return self.open_tokens - self.known_tokens + self.foreign_tokens

    @property
    def has_room(self) -> bool:
        """Whether one more ask would start soon; a few queue there, so that it never idles."""
        if not self.max_sequences:
            return True
        return self.open_sequences < self.max_sequences + max(1, self.max_sequences // 8)

    @property
    def cost(self) -> float:
        """Cost of 1,000 tokens: its label `cost`, 1 without one."""
        try:
            return float(self.labels.get("cost", "1"))
        except ValueError:
            return 1.0

    @property
    def may_come_back(self) -> bool:
        """Whether waiting for it can be worth it."""
        if self.state is WorkerState.DOWN:
            return not self.lost
        return self.state is WorkerState.STARTING


@dataclass(frozen=True, slots=True)
class About:
    """What a worker says of itself once it serves."""

    model: str
    device: str
    labels: Mapping[str, str]
    weights: str = ""
    tokenizer: str = ""
    max_sequences: int = 0
    precision: Precision | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat of a worker."""

    outstanding_tokens: int
    tokens_per_second: float
    stream_speed: float | None
    """Answer tokens a second of one stream since the last beat; None if none was made."""
    idle: bool = False
    """Whether it had nothing to do, now and at the last beat."""


class Registry:
    """All known workers by name; every transition is one method."""

    def __init__(self, changed: Callable[[Worker], None] | None = None) -> None:
        self.workers: dict[str, Worker] = {}
        self._changed = changed

    def declare(self, name: str, *, model: str = "", labels: Mapping[str, str] = {}) -> Worker:
        """Makes a worker known before it is there, so that asks for it wait instead of failing."""
        worker = self.workers.get(name)
        if worker is None:
            worker = self.workers[name] = Worker(name, model=model, labels=dict(labels))
        return worker

    def forget(self, name: str) -> None:
        """The fleet shall no longer have this worker."""
        self.workers.pop(name, None)

    def located(self, name: str, address: str, incarnation: str, process: int = 0) -> bool:
        """Ray says where the worker is; true if it is a process not seen before."""
        worker = self.declare(name)
        if worker.incarnation == incarnation:
            return False
        if worker.incarnation:
            worker.restarts += 1
        worker.address, worker.incarnation, worker.process = address, incarnation, process
        worker.lost, worker.breaker, worker.precision = False, Breaker(), None
        worker.foreign_tokens, worker.speed, worker.tokens_per_second = 0, 0.0, 0.0
        self._move(worker, WorkerState.STARTING, "waiting for its health")
        return True

    def described(self, name: str, about: About) -> None:
        """The worker has said what it is."""
        worker = self.workers[name]
        worker.model, worker.device, worker.labels = about.model, about.device, about.labels
        worker.weights, worker.tokenizer = about.weights, about.tokenizer
        worker.max_sequences, worker.precision = about.max_sequences, about.precision

    def beat(self, name: str, beat: Beat) -> None:
        """The worker has said how busy it is."""
        worker = self.workers[name]
        worker.foreign_tokens = max(0, beat.outstanding_tokens - worker.open_tokens)
        worker.tokens_per_second = beat.tokens_per_second
        if beat.stream_speed is not None:
            old = worker.speed or beat.stream_speed
            worker.speed = old + SPEED_SHARE * (beat.stream_speed - old)
        elif worker.speed and beat.idle:
            # What was seen of an idle worker fades, or one that was slow would never be tried.
            speeds = [each.speed for each in self.workers.values() if each.speed]
            worker.speed += FADING * (sum(speeds) / len(speeds) - worker.speed)

    def outrun(self, name: str, by: str, ratio: float) -> None:
        """One worker was given up because another one spoke first: it is no faster than the
        fraction `ratio` of that one's speed. Nothing else tells, for its answers are never heard.
        """
        worker, other = self.workers.get(name), self.workers.get(by)
        if worker is None or other is None:
            return
        most = other.speed * ratio
        if most < worker.speed:
            worker.speed += SPEED_SHARE * (most - worker.speed)

    def serving(self, name: str) -> None:
        """The worker's health says SERVING."""
        worker = self.workers[name]
        if worker.state is not WorkerState.SERVING:
            worker.epoch += 1
            worker.breaker = Breaker()
        self._move(worker, WorkerState.SERVING, "")

    def draining(self, name: str) -> None:
        """The worker's health says NOT_SERVING."""
        self._move(self.workers[name], WorkerState.DRAINING, "takes no new requests")

    def down(self, name: str, reason: str, *, lost: bool = False) -> None:
        """The worker cannot be reached; `lost` if it will not be started again."""
        worker = self.workers[name]
        worker.lost = lost
        self._move(worker, WorkerState.DOWN, reason)

    def starting(self, name: str, reason: str) -> None:
        """Ray is about to start the worker (again); ignored while its health stream is up."""
        worker = self.declare(name)
        if worker.state in (WorkerState.STARTING, WorkerState.DOWN):
            worker.lost = False
            self._move(worker, WorkerState.STARTING, reason)

    def _move(self, worker: Worker, state: WorkerState, reason: str) -> None:
        changed = worker.state is not state or worker.reason != reason
        worker.state, worker.reason = state, reason
        if changed and self._changed is not None:
            self._changed(worker)
