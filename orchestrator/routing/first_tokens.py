"""How long first tokens take, and so when one is late. Pure.

Every worker has a window of its own, and late is what would be late for the typical one: the lower
median over the workers of each one's quantile. A quantile of all times together would grow to the
slow workers' own as soon as they give a tenth of the answers, and nobody would be hedged any more;
this one stays where it is until half of the workers are slow, whatever share of the answers they
give. What it gives up: prompts of all lengths count as one.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from statistics import median_low

WINDOW = 128
"""Times that are remembered of each worker."""
FEWEST = 5
"""A worker of which fewer were seen says nothing."""


class FirstTokens:
    """Seconds to the first token, by worker."""

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}
        self._ordered: dict[str, list[float]] = {}

    def note(self, worker: str, seconds: float) -> None:
        """A worker has given its first token after so many seconds."""
        recent = self._recent.setdefault(worker, deque())
        ordered = self._ordered.setdefault(worker, [])
        if len(recent) == WINDOW:
            del ordered[bisect_left(ordered, recent.popleft())]
        recent.append(seconds)
        insort(ordered, seconds)

    def usual(self, workers: Iterable[str], fraction: float) -> float | None:
        """Seconds within which the typical one of these workers gives that fraction of its first
        tokens; None if too few were seen."""
        known = (self._ordered.get(worker, ()) for worker in workers)
        quantiles = [
            times[min(len(times) - 1, int(fraction * len(times)))]
            for times in known
            if len(times) >= FEWEST
        ]
        return median_low(quantiles) if quantiles else None
