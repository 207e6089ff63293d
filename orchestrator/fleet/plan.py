"""What to do next so that the fleet becomes what its file says. Pure.

observed x desired -> actions; the supervisor looks, asks this module, acts, and looks again. No
action depends on the outcome of an earlier one, so a lost or repeated round does no harm.

A worker's settings have a version, and two versions of a worker may live at once: that is how a
group is updated, one worker at a time. The new copy starts first where there is room, and the old
one goes only when the new one serves; if the new one cannot start, nothing further is replaced.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from types import MappingProxyType

from ..config import Surge

RELAUNCH_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Pause before the n-th launch in a row of a worker that dies for good; the last one stays."""
SETTLE_SECONDS = 3.0
"""How long a new copy serves before the old one is drained: every gateway knows it by then."""


class Phase(Enum):
    """What Ray says of a worker."""

    ABSENT = auto()
    """No such actor."""
    STARTING = auto()
    """Its constructor runs, or waits for resources, or Ray is restarting it."""
    READY = auto()
    """It has an endpoint."""
    DRAINING = auto()
    """It has been told to go: it ends its open asks and takes no others."""
    FAILED = auto()
    """Its constructor raised; Ray does not try again."""


ALIVE = (Phase.STARTING, Phase.READY)


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """One actor: a worker with one version of its settings."""

    worker: str
    version: str


@dataclass(frozen=True, slots=True)
class Observation:
    """One copy of a worker at one moment, as Ray sees it."""

    phase: Phase
    address: str = ""
    incarnation: str = ""
    process: int = 0
    reason: str = ""
    open_sequences: int = 0
    secret: str = field(default="", repr=False)
    """What the worker wants its callers to show."""


@dataclass(frozen=True, slots=True)
class History:
    """What one copy has been through."""

    ready_once: bool = False
    launches: int = 0
    """Since it was last ready."""
    launched_at: float = float("-inf")
    """Monotonic seconds, as all times here."""
    ready_at: float | None = None
    """Since when it has been ready; None if it is not."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the fleet shall have under one worker's name."""

    version: str
    group: str
    surge: Surge = "auto"


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a missing copy."""

    copy: Copy


@dataclass(frozen=True, slots=True)
class Stop:
    """Drain and end a copy that the fleet shall no longer have."""

    copy: Copy


Action = Launch | Stop


@dataclass(frozen=True, slots=True)
class _Seat:
    """A wanted worker: the copy it shall have, and those of other versions."""

    copy: Copy
    wanted: Wanted
    phase: Phase
    history: History
    outdated: tuple[Copy, ...]
    """The one that answers first."""
    leaving: bool
    """A copy of it drains."""
    started: bool
    """One of the outdated copies serves."""

    @property
    def lost(self) -> bool:
        return self.phase is Phase.FAILED and not self.history.ready_once

    @property
    def busy(self) -> bool:
        """A new copy is on its way, or an old one is."""
        if self.outdated:
            return self.phase in ALIVE
        return self.leaving or (self.phase is not Phase.READY and not self.lost)

    def settled(self, now: float) -> bool:
        ready_at = self.history.ready_at
        return (
            self.phase is Phase.READY and ready_at is not None and now - ready_at >= SETTLE_SECONDS
        )


def plan(
    desired: Mapping[str, Wanted],
    observed: Mapping[Copy, Observation],
    history: Mapping[Copy, History],
    now: float,
    *,
    known: Collection[str] = (),
    room: Collection[str] = (),
    patience_ends: float = float("-inf"),
) -> list[Action]:
    """The actions due now, in the order of `desired`, then what is too much, by name.

    Args:
        known: workers that the fleet file allows, wanted or not; others are strangers, which stay
            until all that is wanted serves, or until `patience_ends`.
        room: groups of which one more worker finds a node now.
    """
    seats = [_seat(name, wanted, observed, history) for name, wanted in desired.items()]
    actions: list[Action] = [
        Launch(seat.copy)
        for seat in seats
        if not seat.outdated and not seat.leaving and _missing(seat, now)
    ]
    for group in dict.fromkeys(seat.wanted.group for seat in seats):
        members = [seat for seat in seats if seat.wanted.group == group]
        actions += _update(members, group in room, now)
    settled = all(seat.phase is Phase.READY or seat.lost for seat in seats)
    stays = () if settled or now >= patience_ends else set(observed_names(observed)) - set(known)
    actions += [
        Stop(copy)
        for copy, seen in sorted(observed.items(), key=lambda item: item[0])
        if seen.phase is Phase.DRAINING
        or (seen.phase in ALIVE and copy.worker not in desired and copy.worker not in stays)
    ]
    return actions


def outdated_groups(
    desired: Mapping[str, Wanted], observed: Mapping[Copy, Observation]
) -> set[str]:
    """Groups with a worker that runs other settings than it shall."""
    return {
        wanted.group
        for name, wanted in desired.items()
        if _seat(name, wanted, observed, {}).outdated
    }


def face(
    copies: Mapping[Copy, Observation],
    version: str | None,
    history: Mapping[Copy, History] = MappingProxyType({}),
) -> tuple[Copy, Observation]:
    """The copy of a worker that shall answer: one that serves, the wanted version before others,
    then the one that has come last."""

    def rank(item: tuple[Copy, Observation]) -> tuple[int, bool, float]:
        copy, seen = item
        since = history.get(copy, History()).ready_at or 0.0
        return _FACES.index(seen.phase), copy.version != version, -since

    return min(copies.items(), key=rank)


def observed_names(observed: Iterable[Copy]) -> list[str]:
    """The workers' names, each once."""
    return list(dict.fromkeys(copy.worker for copy in observed))


def is_lost(seen: Observation, history: History) -> bool:
    """Whether the copy failed in a way that a further launch would only repeat."""
    return seen.phase is Phase.FAILED and not history.ready_once


def remember(seen: Observation, history: History, now: float) -> History:
    """The history after one more look."""
    if seen.phase is not Phase.READY:
        return replace(history, ready_at=None)
    ready_at = now if history.ready_at is None else history.ready_at
    return replace(history, ready_once=True, launches=0, ready_at=ready_at)


def launched(history: History, now: float) -> History:
    """The history after one more launch."""
    return replace(history, launches=history.launches + 1, launched_at=now)


_FACES = (Phase.READY, Phase.STARTING, Phase.FAILED, Phase.DRAINING, Phase.ABSENT)


def _seat(
    name: str,
    wanted: Wanted,
    observed: Mapping[Copy, Observation],
    history: Mapping[Copy, History],
) -> _Seat:
    copy = Copy(name, wanted.version)
    copies = {other: seen for other, seen in observed.items() if other.worker == name}
    seen = copies.pop(copy, None)
    phase = seen.phase if seen is not None else Phase.ABSENT
    phases = [phase, *(each.phase for each in copies.values())]
    alive = {other: each for other, each in copies.items() if each.phase in ALIVE}
    first = [face(alive, None, history)[0]] if alive else []
    return _Seat(
        copy=copy,
        wanted=wanted,
        phase=phase,
        history=history.get(copy, History()),
        outdated=(*first, *(other for other in alive if other not in first)),
        leaving=Phase.DRAINING in phases,
        started=Phase.READY in phases[1:],
    )


def _update(seats: list[_Seat], room: bool, now: float) -> list[Action]:
    """The next step from old settings to new ones in one group."""
    for seat in seats:
        if seat.outdated and seat.settled(now):
            return [Stop(copy) for copy in seat.outdated]
    for seat in seats:
        if len(seat.outdated) > 1 and seat.started:
            return [Stop(copy) for copy in seat.outdated[1:]]  # of an update that was overtaken
    if any(seat.lost or seat.busy for seat in seats):
        return []
    # Those that do not serve first: replacing them costs nothing.
    waiting = sorted((seat for seat in seats if seat.outdated), key=lambda seat: seat.started)
    if not waiting:
        return []
    seat = waiting[0]
    if seat.wanted.surge == "always" or (seat.wanted.surge == "auto" and room):
        return [Launch(seat.copy)] if _missing(seat, now) else []
    return [Stop(copy) for copy in seat.outdated]


def _missing(seat: _Seat, now: float) -> bool:
    """Whether the copy is due to be launched."""
    if seat.phase in (*ALIVE, Phase.DRAINING) or seat.lost:
        return False
    past = seat.history
    if past.launches == 0 and not past.ready_once:
        return True
    pause = RELAUNCH_SECONDS[min(past.launches, len(RELAUNCH_SECONDS) - 1)]
    return now - past.launched_at >= pause
