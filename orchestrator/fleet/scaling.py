"""How many workers a group shall have, from how busy it is. Pure.

Up at once, down late: the size is the largest need of the last `scale_down_after_seconds`, so that
a load that comes and goes does not start and stop workers (Kubernetes' HPA does the same).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .plan import Phase


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """How busy the workers of one group are, all gateways' asks together."""

    serving: int
    """Workers that serve now."""
    open_sequences: int
    """Answers that run or wait at them."""
    waiting: int
    """Asks that wait at the gateway for any worker of the fleet."""
    capacity: int
    """Sequences that one worker runs at once."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the fleet file says of a group's size."""

    smallest: int
    largest: int
    target_load: float
    calm_seconds: float
    """A need that is over counts for so long."""


Peaks = tuple[tuple[float, int], ...]
"""(time, need), later ones smaller: the needs that no later need has reached. Never empty."""


def need(load: GroupLoad, bounds: Bounds) -> int:
    """Workers that carry this load at the target, within the bounds.

    Asks wait at the gateway because the workers that fit them are full: a group that has room is
    not what they wait for.
    """
    full = load.open_sequences >= load.serving * load.capacity
    sequences = load.open_sequences + (load.waiting if full else 0)
    wanted = math.ceil(sequences / (load.capacity * bounds.target_load) - 1e-9)
    return min(max(wanted, bounds.smallest), bounds.largest)


def resize(peaks: Peaks, load: GroupLoad, bounds: Bounds, now: float) -> Peaks:
    """The peaks after one more measurement."""
    wanted = need(load, bounds)
    kept = [peak for peak in peaks if peak[1] > wanted and now - peak[0] < bounds.calm_seconds]
    return (*kept, (now, wanted))


def size(peaks: Peaks, bounds: Bounds) -> int:
    """How many workers there shall be."""
    return min(max(peaks[0][1], bounds.smallest), bounds.largest)


def chosen(names: Sequence[str], phases: Mapping[str, Phase], count: int) -> list[str]:
    """Which workers of a group there shall be: those that serve before those that start, and the
    lower numbers before the higher; in the order of `names`.
    """
    ranked = sorted(names, key=lambda name: _RANK[phases.get(name, Phase.ABSENT)])
    kept = set(ranked[:count])
    return [name for name in names if name in kept]


_RANK = {
    Phase.READY: 0,
    Phase.STARTING: 1,
    Phase.FAILED: 1,  # its place is not given to another, which would fail as well
    Phase.ABSENT: 2,
    Phase.DRAINING: 3,
}
