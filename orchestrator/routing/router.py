"""Which worker answers an ask. Pure.

The measure is work: tokens outstanding at a worker, this ask's included, over the speed observed
there. With one gateway the outstanding tokens are known exactly and the minimum is the best choice.
When other gateways send work too, what is known of it is up to a heartbeat old, and everybody would
run to the same minimum: then the better of two drawn at random is taken (Mitzenmacher 2001).
A session's worker, or one that has computed the prompt's beginning, is preferred only while it is
hardly worse than the best: affinity that outweighs load makes tails longer. What that worker need
not compute again is no work, neither of this ask nor of those that it has. A worker whose breaker
lets one ask through to try it gets the next one: if it fails, the ask goes on elsewhere.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ...worker.errors import ConclaveError
from ...worker.knobs import Knobs
from .prefix import NOTHING, Known
from .registry import Worker, WorkerState

WARM_GAP = 1.25
"""How much more work than the best a worker may have and still be taken for what it remembers."""
WARM_TOKENS = 128
"""That much more is always fine: a prefill saved outweighs it."""
CANARY = "canary"
"""Label: the share (0 to 1) of the asks that fit the worker which go to workers like it."""


class WorkerNotFound(ConclaveError):
    """No known worker fits the selector."""


@dataclass(frozen=True, slots=True)
class Selector:
    """Which workers may answer; all conditions hold at once, an empty one holds always."""

    names: frozenset[str] = frozenset()
    model: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    knobs: Knobs | None = None
    """The least that its weights must be."""

    def matches(self, worker: Worker) -> bool:
        """Whether the worker may answer."""
        return self.means(worker) and (self.knobs is None or _will_do(worker, self.knobs))

    def means(self, worker: Worker) -> bool:
        """Whether name, model and labels fit, whatever its weights."""
        if self.names and worker.name not in self.names:
            return False
        if self.model and worker.model != self.model:
            return False
        return all(worker.labels.get(key) == value for key, value in self.labels.items())

    def __str__(self) -> str:
        parts = [f"names {', '.join(sorted(self.names))}"] if self.names else []
        parts += [f"model {self.model}"] if self.model else []
        parts += [f"label {key}={value}" for key, value in sorted(self.labels.items())]
        parts += [f"knobs {self.knobs}"] if self.knobs is not None else []
        return "; ".join(parts) or "any worker"


ANY = Selector()


def matching(workers: Iterable[Worker], selector: Selector) -> list[Worker]:
    """Every known worker that fits. Raises WorkerNotFound if there is none."""
    known = list(workers)
    found = [worker for worker in known if selector is ANY or selector.matches(worker)]
    if not found:
        near = [worker for worker in known if selector.means(worker)]
        there = "; ".join(f"{worker.name}: {worker.precision or 'unknown'}" for worker in near[:8])
        lacking = f" (there are {there})" if there else ""
        raise WorkerNotFound(f"the fleet has no worker for: {selector}{lacking}; see ListWorkers")
    return found


def _will_do(worker: Worker, knobs: Knobs) -> bool:
    """Whether its weights are so much; one that has yet to say what it runs may turn out so."""
    if worker.precision is None:
        return worker.state is not WorkerState.SERVING
    return not knobs.limits_broken(worker.precision)


Turn = tuple[str, int]
"""A worker's name and epoch: one chance for one ask."""


def turn(worker: Worker) -> Turn:
    """The chance that the worker is now."""
    return worker.name, worker.epoch


@dataclass(slots=True)
class Wish:
    """What an ask wants of its worker."""

    selector: Selector = ANY
    tokens: int = 0
    """Prompt and answer tokens that it may cost."""
    tried: set[Turn] = field(default_factory=set)
    """Turns that have failed it; a worker that came back is a new chance."""
    avoid: frozenset[str] = frozenset()
    """Workers that other members of its ensemble have."""
    weights: str = ""
    """Fingerprint that the worker must have, to go on with a stream."""
    pinned: str = ""
    """The worker to have if it can, whatever its load."""
    warm: tuple[str, ...] = ()
    """Workers to prefer while the load gap is small: the session's, the prompt's."""
    known: Known = NOTHING
    """What is known of its prompt's beginning; the same from placing it to its release."""
    draw: float = 0.0
    """A number in [0, 1) of its own, for the canary share and the two choices."""

    def allows(self, worker: Worker) -> bool:
        """Whether the worker may ever answer."""
        if self.weights and worker.weights != self.weights:
            return False
        return worker.name not in self.avoid

    def known_at(self, worker: Worker) -> int:
        """Tokens that the worker need not compute, as far as one knows."""
        return min(self.tokens, self.known.expected) if worker.name == self.known.worker else 0


def candidates(workers: Iterable[Worker], wish: Wish) -> list[Worker]:
    """Every known worker that may ever answer. Raises WorkerNotFound if none fits the selector."""
    return [worker for worker in matching(workers, wish.selector) if wish.allows(worker)]


def choose(workers: Iterable[Worker], wish: Wish, now: float) -> Worker | None:
    """The worker for an ask; None if none can take it now.

    Raises WorkerNotFound if no worker ever could. `now` is the breakers' clock.
    """
    able = [
        worker
        for worker in candidates(workers, wish)
        if worker.state is WorkerState.SERVING
        and worker.has_room
        and worker.breaker.allows(now)
        and turn(worker) not in wish.tried
    ]
    pinned = [worker for worker in able if worker.name == wish.pinned]
    probed = [worker for worker in able if worker.breaker.open]
    able = pinned or probed or _canaries(able, wish)
    if len(able) < 2:
        return able[0] if able else None
    speed = typical_speed(able)

    def work(worker: Worker) -> float:
        tokens = worker.outstanding_tokens + wish.tokens - wish.known_at(worker)
        return tokens / (worker.speed or speed)

    best = min(_contenders(able, wish), key=lambda w: (work(w), w.served_requests, w.name))
    return _warm(able, wish, limit=work(best) * WARM_GAP + WARM_TOKENS / speed, work=work) or best


def _canaries(able: list[Worker], wish: Wish) -> list[Worker]:
    """The canaries for their share of the asks, the others for the rest, whoever is there if not.

    An ask that names its worker or its labels has chosen for itself.
    """
    shares = {worker.name: _share(worker) for worker in able}
    if wish.selector.names or wish.selector.labels or not any(shares.values()):
        return able
    chosen = wish.draw < max(shares.values())
    return [worker for worker in able if bool(shares[worker.name]) is chosen] or able


def _share(worker: Worker) -> float:
    try:
        return float(worker.labels.get(CANARY, "0"))
    except ValueError:
        return 0.0


def typical_speed(workers: Collection[Worker]) -> float:
    """Tokens a second of one stream of a worker of which nothing has been seen."""
    known = [worker.speed for worker in workers if worker.speed > 0]
    return sum(known) / len(known) if known else 1.0


def _contenders(able: list[Worker], wish: Wish) -> list[Worker]:
    """All, or two of them while the view is stale."""
    if not any(worker.foreign_tokens for worker in able):
        return able
    first = int(wish.draw * len(able))
    second = (first + 1 + int(wish.draw * 7919 % (len(able) - 1))) % len(able)
    return [able[first], able[second]]


def _warm(
    able: list[Worker], wish: Wish, limit: float, work: Callable[[Worker], float]
) -> Worker | None:
    for name in wish.warm:
        for worker in able:
            if worker.name == name and work(worker) <= limit:
                return worker
    return None
