"""Keeps the fleet as its file says: look, plan, act, once a second, in a thread of its own.

Ray's calls block, so nothing of this runs on the gateway's loop; what was seen is handed over
through `report`. A round that fails is logged and tried again. Of several supervisors of one fleet
one leads; the others only look, and one of them takes the lead when it is free.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from ..config import FleetConfig, WorkerSpec
from .plan import (
    ALIVE,
    Action,
    Copy,
    History,
    Launch,
    Observation,
    Phase,
    Stop,
    Wanted,
    face,
    is_lost,
    launched,
    observed_names,
    outdated_groups,
    plan,
    remember,
)
from .sizes import Sizes

log = logging.getLogger(__name__)

ROUND_SECONDS = 1.0
STRANGER_SECONDS = 300.0
"""How long workers that a new fleet file leaves out wait for those it brings."""
ASLEEP = Observation(Phase.ABSENT, reason="its group has no workers now; an ask starts one")


class Actors(Protocol):
    """What the supervisor needs of a cluster."""

    def lead(self) -> bool:
        """Whether this process is the one that starts and stops workers; tries to become it."""

    def launch(self, spec: WorkerSpec) -> None:
        """Starts a worker."""

    def observe(self) -> dict[Copy, Observation]:
        """How every worker is."""

    def retire(self, copy: Copy, grace: float | None) -> None:
        """Begins to drain a worker, which then ends; harmless if that is under way."""

    def room(self, spec: WorkerSpec) -> bool:
        """Whether a node has room for one more such worker."""

    def request(self, specs: Sequence[WorkerSpec]) -> None:
        """Asks the autoscaler for nodes that hold all these; none takes the request back."""


class Sighting(Protocol):
    """Who wants to know what was seen; called in the supervisor's thread."""

    def __call__(self, name: str, seen: Observation | None, *, lost: bool) -> None:
        """One worker, and whether it is lost for good; None if it is no longer of the fleet."""


class Supervisor:
    """Owns the thread in which Ray is spoken to.

    Args:
        waiting: how many asks wait at the gateway.
        may_lead: whether it may ever start and stop workers.
    """

    def __init__(
        self,
        actors: Actors,
        config: FleetConfig,
        report: Sighting,
        *,
        waiting: Callable[[], int] = lambda: 0,
        may_lead: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._actors = actors
        self._sizes = Sizes(config)
        self._report = report
        self._waiting = waiting
        self._may_lead = may_lead
        self._clock = clock
        self._history: dict[Copy, History] = {}
        self._told = set(config.first_names())
        self._warned: set[Copy] = set()
        self._leads = False
        self._next: FleetConfig | None = None
        self._patience_ends = clock() + STRANGER_SECONDS
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def poke(self) -> None:
        """Something has changed: look now. May be called from any thread."""
        self._wake.set()

    def update(self, config: FleetConfig) -> None:
        """From the next round on the fleet shall be so. May be called from any thread."""
        self._next = config
        self._wake.set()

    def stop(self) -> None:
        """Ends the thread after its current round."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()

    def round(self) -> None:
        """One look and what follows from it."""
        self._adopt()
        observed = self._actors.observe()
        self._remember(observed)
        self._leads = self._may_lead and self._actors.lead()
        if not self._leads:
            self._tell(observed, ())
            return
        desired = self._sizes.desired(observed, self._waiting(), self._clock())
        actions = self._plan(desired, observed)
        going = {a.copy: _going(observed[a.copy]) for a in actions if isinstance(a, Stop)}
        # First the gateway hears which workers go, then they do.
        self._tell({**observed, **going}, desired)
        for action in actions:
            self._act(action, observed)
        self._request(desired, observed)

    def _adopt(self) -> None:
        config, self._next = self._next, None
        if config is not None:
            self._sizes.adopt(config)
            self._patience_ends = self._clock() + STRANGER_SECONDS

    def _remember(self, observed: Mapping[Copy, Observation]) -> None:
        now = self._clock()
        for copy, seen in observed.items():
            past = self._history.get(copy, History())
            self._history[copy] = remember(seen, past, now)
            if is_lost(seen, past) and copy not in self._warned:
                self._warned.add(copy)
                others = [o for o in observed if o.worker == copy.worker and o != copy]
                if any(observed[other].phase in ALIVE for other in others):
                    log.error(_HALTED, copy.worker, seen.reason)

    def _plan(
        self, desired: Mapping[str, Wanted], observed: Mapping[Copy, Observation]
    ) -> list[Action]:
        updating = outdated_groups(desired, observed)
        members = {wanted.group: name for name, wanted in desired.items()}
        room = {
            group
            for group, name in members.items()
            if group in updating
            and desired[name].surge == "auto"
            and self._actors.room(self._sizes.specs[name])
        }
        return plan(
            desired,
            observed,
            self._history,
            self._clock(),
            known=self._sizes.specs.keys(),
            room=room,
            patience_ends=self._patience_ends,
        )

    def _tell(self, observed: Mapping[Copy, Observation], desired: Collection[str]) -> None:
        """Reports one face of every worker, and which workers are gone."""
        shown = set()
        for name in observed_names(observed):
            copies = {copy: seen for copy, seen in observed.items() if copy.worker == name}
            copy, seen = face(copies, self._sizes.version(name), self._history)
            if self._counts(name, seen, desired):
                shown.add(name)
                lost = is_lost(seen, self._history.get(copy, History()))
                self._report(name, seen, lost=lost)
        here = shown.union(desired)
        for group in self._sizes.groups:
            if group.names() and here.isdisjoint(group.names()):
                here.add(group.names()[0])
                self._report(group.names()[0], ASLEEP, lost=False)
        for name in sorted(self._told - here):
            self._report(name, None, lost=False)
        self._told = here

    def _counts(self, name: str, seen: Observation, desired: Collection[str]) -> bool:
        """Whether a worker belongs to the picture; of one that ended only its name is left."""
        if seen.phase is Phase.ABSENT:
            return name in desired
        return seen.phase is not Phase.FAILED or name in self._sizes.specs

    def _act(self, action: Action, observed: Mapping[Copy, Observation]) -> None:
        copy = action.copy
        match action:
            case Launch():
                self._history[copy] = launched(self._history.get(copy, History()), self._clock())
                self._actors.launch(self._sizes.specs[copy.worker])
            case Stop():
                if observed[copy].phase is not Phase.DRAINING:
                    log.info("worker %s with settings %s goes", copy.worker, copy.version)
                self._actors.retire(copy, self._sizes.grace(copy.worker))

    def _request(self, desired: Mapping[str, Wanted], observed: Mapping[Copy, Observation]) -> None:
        """Lets the autoscaler know of all workers while one of them is missing."""
        specs = [self._sizes.specs[name] for name in desired]
        missing = [
            spec
            for spec in specs
            if (seen := observed.get(Copy(spec.name, spec.version))) is None
            or seen.phase is Phase.STARTING
        ]
        self._actors.request(specs if missing else ())

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self.round()
            except Exception:
                # Ray raises many kinds here when its head goes away; the next round may succeed.
                log.warning("could not look after the workers", exc_info=True)
            self._wake.wait(ROUND_SECONDS)
        if self._leads:
            with suppress(Exception):
                self._actors.request(())  # nodes must not be kept for a gateway that is gone


_HALTED = (
    "the update stops: worker %s could not start with its new settings: %s. "
    "What has not been replaced stays as it is; mend the fleet file and load it again"
)


def _going(seen: Observation) -> Observation:
    """What the gateway hears of a worker that is about to drain."""
    return replace(seen, phase=Phase.DRAINING, reason="drains before it ends")
