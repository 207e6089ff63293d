"""What to do next so that the fleet becomes what its file says. Pure.

observed x desired -> actions; the supervisor looks, asks this module, acts, and looks again. No
action depends on the outcome of an earlier one, so a lost or repeated round does no harm.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto

RELAUNCH_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Pause before the n-th launch in a row of a worker that dies for good; the last one stays."""


class Phase(Enum):
    """What Ray says of a worker."""

    ABSENT = auto()
    """No such actor."""
    STARTING = auto()
    """Its constructor runs, or waits for resources, or Ray is restarting it."""
    READY = auto()
    """It has an endpoint."""
    FAILED = auto()
    """Its constructor raised; Ray does not try again."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One worker at one moment, as Ray sees it."""

    phase: Phase
    address: str = ""
    incarnation: str = ""
    process: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class History:
    """What one worker has been through."""

    ready_once: bool = False
    launches: int = 0
    """Since it was last ready."""
    launched_at: float = float("-inf")
    """Monotonic seconds."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a missing worker."""

    name: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Drain and end a worker that the fleet shall no longer have."""

    name: str


Action = Launch | Stop


def plan(
    desired: Collection[str],
    observed: Mapping[str, Observation],
    history: Mapping[str, History],
    now: float,
) -> list[Action]:
    """The actions due now, in the order of `desired`, then the surplus by name."""
    launches: list[Action] = [
        Launch(name)
        for name in desired
        if _missing(observed.get(name), history.get(name, History()), now)
    ]
    surplus = [name for name, seen in observed.items() if _surplus(name, seen, desired)]
    return launches + [Stop(name) for name in sorted(surplus)]


def is_lost(seen: Observation, history: History) -> bool:
    """Whether the worker failed in a way that a further launch would only repeat."""
    return seen.phase is Phase.FAILED and not history.ready_once


def remember(seen: Observation, history: History) -> History:
    """The history after one more look."""
    if seen.phase is Phase.READY:
        return History(ready_once=True, launches=0, launched_at=history.launched_at)
    return history


def launched(history: History, now: float) -> History:
    """The history after one more launch."""
    return History(history.ready_once, history.launches + 1, launched_at=now)


def _missing(seen: Observation | None, history: History, now: float) -> bool:
    if seen is not None and seen.phase in (Phase.STARTING, Phase.READY):
        return False
    if seen is not None and is_lost(seen, history):
        return False
    if history.launches == 0 and not history.ready_once:
        return True
    pause = RELAUNCH_SECONDS[min(history.launches, len(RELAUNCH_SECONDS) - 1)]
    return now - history.launched_at >= pause


def _surplus(name: str, seen: Observation, desired: Collection[str]) -> bool:
    return name not in desired and seen.phase in (Phase.STARTING, Phase.READY)
