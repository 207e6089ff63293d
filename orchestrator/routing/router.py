"""Which worker answers an ask: the least loaded one that serves and fits. Pure.

Gave up for now: prefix affinity and power-of-two choices. With one gateway the open requests are
known exactly, so the plain minimum is the better choice.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ...worker.errors import ConclaveError
from .registry import Worker, WorkerState


class WorkerNotFound(ConclaveError):
    """No known worker fits the selector."""


@dataclass(frozen=True, slots=True)
class Selector:
    """Which workers may answer; all conditions hold at once, an empty one holds always."""

    names: frozenset[str] = frozenset()
    model: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def matches(self, worker: Worker) -> bool:
        """Whether the worker may answer."""
        if self.names and worker.name not in self.names:
            return False
        if self.model and worker.model != self.model:
            return False
        return all(worker.labels.get(key) == value for key, value in self.labels.items())

    def __str__(self) -> str:
        parts = [f"names {', '.join(sorted(self.names))}"] if self.names else []
        parts += [f"model {self.model}"] if self.model else []
        parts += [f"label {key}={value}" for key, value in sorted(self.labels.items())]
        return "; ".join(parts) or "any worker"


ANY = Selector()


def matching(workers: Iterable[Worker], selector: Selector) -> list[Worker]:
    """Every known worker that fits. Raises WorkerNotFound if there is none."""
    found = [worker for worker in workers if selector is ANY or selector.matches(worker)]
    if not found:
        raise WorkerNotFound(f"the fleet has no worker for: {selector}; see ListWorkers")
    return found


Turn = tuple[str, int]
"""A worker's name and epoch: one chance for one ask."""


def turn(worker: Worker) -> Turn:
    """The chance that the worker is now."""
    return worker.name, worker.epoch


def choose(workers: Iterable[Worker], selector: Selector, tried: Collection[Turn]) -> Worker | None:
    """The worker with the fewest open requests, then the fewest served, then by name.

    `tried` holds the turns that have failed this ask already; a worker that came back is a new
    chance. None if nobody serves; raises WorkerNotFound if nobody ever could.
    """
    serving = [
        worker
        for worker in matching(workers, selector)
        if worker.state is WorkerState.SERVING and turn(worker) not in tried
    ]
    return min(serving, key=_load, default=None)


def _load(worker: Worker) -> tuple[int, int, str]:
    return worker.open_requests, worker.served_requests, worker.name
