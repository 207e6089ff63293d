"""The workers that a fleet shall have now: its groups, each as large as its load wants it."""

import logging
from collections.abc import Mapping

from ..config import FleetConfig, WorkerGroup
from .plan import ALIVE, Copy, Observation, Phase, Wanted, face
from .scaling import Bounds, GroupLoad, Peaks, chosen, resize, size

log = logging.getLogger(__name__)


class Sizes:
    """Remembers of every group how much it has needed lately."""

    def __init__(self, config: FleetConfig) -> None:
        self.adopt(config)
        self._peaks: dict[str, Peaks] = {}

    def adopt(self, config: FleetConfig) -> None:
        """The fleet shall be so from now on; what groups of the same name needed still counts."""
        self.groups = config.workers
        self.specs = {spec.name: spec for spec in config.specs()}

    def desired(
        self, observed: Mapping[Copy, Observation], waiting: int, now: float
    ) -> dict[str, Wanted]:
        """The workers that there shall be; `waiting` asks wait at the gateway."""
        desired = {}
        for group in self.groups:
            phases = self._phases(group, observed)
            count = self._size(group, phases, _open(group, observed), waiting, now)
            for name in chosen(group.names(), phases, count):
                desired[name] = Wanted(self.specs[name].version, group.name, group.surge)
        return desired

    def version(self, name: str) -> str | None:
        """The version of its settings that a worker shall have; None if it shall not be."""
        spec = self.specs.get(name)
        return spec.version if spec is not None else None

    def grace(self, name: str) -> float | None:
        """How long a worker that goes may take to end its answers."""
        spec = self.specs.get(name)
        if spec is None:
            return None
        return next(group.drain_seconds for group in self.groups if group.name == spec.group)

    def _phases(self, group: WorkerGroup, observed: Mapping[Copy, Observation]) -> dict[str, Phase]:
        phases = {}
        for name in group.names():
            copies = {copy: seen for copy, seen in observed.items() if copy.worker == name}
            if copies:
                phases[name] = face(copies, self.version(name))[1].phase
        return phases

    def _size(
        self,
        group: WorkerGroup,
        phases: Mapping[str, Phase],
        open_sequences: int,
        waiting: int,
        now: float,
    ) -> int:
        serving = sum(phase is Phase.READY for phase in phases.values())
        load = GroupLoad(serving, open_sequences, waiting, group.engine.max_sequences)
        bounds = Bounds(
            group.smallest, group.largest, group.target_load, group.scale_down_after_seconds
        )
        # Workers found at the start stay as long as if they had been needed until now.
        found = sum(phase in ALIVE for phase in phases.values())
        before = self._peaks.get(group.name, ((now, found),))
        after = self._peaks[group.name] = resize(before, load, bounds, now)
        old, new = size(before, bounds), size(after, bounds)
        if old != new:
            log.info("group %s goes from %d to %d workers: %s", group.name, old, new, load)
        return new


def _open(group: WorkerGroup, observed: Mapping[Copy, Observation]) -> int:
    members = set(group.names())
    return sum(
        seen.open_sequences
        for copy, seen in observed.items()
        if copy.worker in members and seen.phase is Phase.READY
    )
