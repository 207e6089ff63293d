"""A running fleet: a cluster, its supervisor and its gateway, started and stopped as one.

The supervisor lives in a thread and the gateway on the event loop; this is where they meet.
"""

import asyncio
import logging
from collections.abc import Callable

from ..config import FleetConfig
from ..gateway.server import Gateway
from ..routing.registry import Worker, WorkerState
from .cluster import Cluster
from .plan import Observation, Phase
from .supervisor import Supervisor

log = logging.getLogger(__name__)


class Fleet:
    """What `conclave serve` runs. `changed` hears of every worker's every new state."""

    def __init__(
        self,
        config: FleetConfig,
        cluster: Cluster,
        changed: Callable[[Worker], None] | None = None,
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._changed = changed
        self._specs = config.specs()
        self._settled = asyncio.Event()
        self.gateway = Gateway(config.gateway, fleet=config.name, changed=self._worker_changed)
        self._supervisor: Supervisor | None = None

    @property
    def workers(self) -> list[Worker]:
        """Every worker of the fleet file."""
        return list(self.gateway.registry.workers.values())

    async def start(self) -> None:
        """Listens at once and begins to start workers; does not wait for them."""
        for spec in self._specs:
            model = spec.config.engine.model.resolve().name
            self.gateway.declare(spec.name, model=model, labels=spec.config.labels)
        await self.gateway.start()
        loop = asyncio.get_running_loop()

        def report(name: str, seen: Observation, *, lost: bool) -> None:
            loop.call_soon_threadsafe(self._tell, name, seen, lost)

        self._supervisor = Supervisor(
            self._cluster, self._specs, report, grace=self._config.gateway.grace_seconds
        )
        self._supervisor.start()

    async def settled(self) -> bool:
        """Waits until every worker serves or is lost; true if at least one serves."""
        await self._settled.wait()
        return any(worker.state is WorkerState.SERVING for worker in self.workers)

    async def stop(self) -> None:
        """Refuses new asks, lets the open ones end, and ends every worker that is not detached."""
        if self._supervisor is not None:
            await asyncio.to_thread(self._supervisor.stop)
        grace = self._config.gateway.grace_seconds
        await self.gateway.stop(grace)
        attached = [spec.name for spec in self._specs if not spec.detached]
        await asyncio.to_thread(self._cluster.stop, attached, grace)

    def _tell(self, name: str, seen: Observation, lost: bool) -> None:
        if seen.phase is Phase.READY:
            self.gateway.located(name, seen.address, seen.incarnation, seen.process)
        elif lost:
            self.gateway.lost(name, seen.reason)
        else:
            self.gateway.absent(name, seen.reason)

    def _worker_changed(self, worker: Worker) -> None:
        if worker.state is WorkerState.DOWN and self._supervisor is not None:
            self._supervisor.poke()
        if all(w.state is WorkerState.SERVING or w.lost for w in self.workers):
            self._settled.set()
        if self._changed is not None:
            self._changed(worker)
