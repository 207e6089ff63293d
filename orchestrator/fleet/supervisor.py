"""Keeps the fleet as its file says: look, plan, act, once a second, in a thread of its own.

Ray's calls block, so nothing of this runs on the gateway's loop; what was seen is handed over
through `report`. A round that fails is logged and tried again.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..config import WorkerSpec
from .plan import (
    Action,
    History,
    Launch,
    Observation,
    Stop,
    is_lost,
    launched,
    plan,
    remember,
)

log = logging.getLogger(__name__)

ROUND_SECONDS = 1.0


class Actors(Protocol):
    """What the supervisor needs of a cluster."""

    def launch(self, spec: WorkerSpec) -> None:
        """Starts a worker."""

    def observe(self) -> dict[str, Observation]:
        """How every worker is."""

    def stop(self, names: Sequence[str], grace: float) -> None:
        """Drains and ends workers."""


class Sighting(Protocol):
    """Who wants to know what was seen; called in the supervisor's thread."""

    def __call__(self, name: str, seen: Observation, *, lost: bool) -> None:
        """One worker, and whether it is lost for good."""


class Supervisor:
    """Owns the thread in which Ray is spoken to."""

    def __init__(
        self,
        actors: Actors,
        specs: Sequence[WorkerSpec],
        report: Sighting,
        *,
        grace: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._actors = actors
        self._specs: Mapping[str, WorkerSpec] = {spec.name: spec for spec in specs}
        self._report = report
        self._grace = grace
        self._clock = clock
        self._history = dict.fromkeys(self._specs, History())
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def poke(self) -> None:
        """Something has changed: look now. May be called from any thread."""
        self._wake.set()

    def stop(self) -> None:
        """Ends the thread after its current round."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()

    def round(self) -> None:
        """One look and what follows from it."""
        observed = self._actors.observe()
        for name in self._specs:
            seen = observed.get(name)
            if seen is not None:
                self._history[name] = remember(seen, self._history[name])
                self._report(name, seen, lost=is_lost(seen, self._history[name]))
        for action in plan(self._specs.keys(), observed, self._history, self._clock()):
            self._act(action)

    def _act(self, action: Action) -> None:
        match action:
            case Launch(name):
                self._history[name] = launched(self._history[name], self._clock())
                self._actors.launch(self._specs[name])
            case Stop(name):
                log.info("stopping the worker %s, which is not in the fleet file", name)
                self._actors.stop([name], self._grace)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self.round()
            except Exception:
                # Ray raises many kinds here when its head goes away; the next round may succeed.
                log.warning("could not look after the workers", exc_info=True)
            self._wake.wait(ROUND_SECONDS)
