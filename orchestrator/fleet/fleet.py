"""A running fleet: a cluster, its supervisor and its gateway, started and stopped as one.

The supervisor lives in a thread and the gateway on the event loop; this is where they meet.
"""

import asyncio
import logging
from collections.abc import Callable

from ...worker.errors import ConfigError
from ..config import FleetConfig
from ..gateway.server import Gateway
from ..routing.registry import Worker, WorkerState
from .cluster import Cluster
from .plan import Observation, Phase
from .supervisor import Supervisor

log = logging.getLogger(__name__)


class Fleet:
    """What `conclave serve` runs.

    Args:
        changed: hears of every worker's every new state.
        may_lead: whether this process may start and stop workers; else it only follows them.
    """

    def __init__(
        self,
        config: FleetConfig,
        cluster: Cluster,
        changed: Callable[[Worker], None] | None = None,
        *,
        may_lead: bool = True,
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._changed = changed
        self._may_lead = may_lead
        self._specs = {spec.name: spec for spec in config.specs()}
        self._settled = asyncio.Event()
        self.gateway = Gateway(config.gateway, fleet=config.name, changed=self._worker_changed)
        self._supervisor: Supervisor | None = None

    @property
    def workers(self) -> list[Worker]:
        """Every worker that the fleet has now."""
        return list(self.gateway.registry.workers.values())

    async def start(self) -> None:
        """Listens at once and begins to start workers; does not wait for them."""
        for name in self._config.first_names():
            self._declare(name)
        await self.gateway.start()
        loop = asyncio.get_running_loop()

        def report(name: str, seen: Observation | None, *, lost: bool) -> None:
            loop.call_soon_threadsafe(self._tell, name, seen, lost)

        self._supervisor = Supervisor(
            self._cluster,
            self._config,
            report,
            waiting=lambda: self.gateway.queued,
            may_lead=self._may_lead,
        )
        self._supervisor.start()

    def update(self, config: FleetConfig) -> None:
        """Brings the running fleet to a new file: group by group and worker by worker, while asks
        go on. Raises ConfigError if that cannot be done without a restart.
        """
        if config.name != self._config.name:
            raise ConfigError(
                f"the fleet's name is {self._config.name} and cannot become {config.name}"
            )
        if config.gateway != self._config.gateway:
            log.warning("changes of `gateway` need a restart; they are left out")
        self._config = config.model_copy(update={"gateway": self._config.gateway})
        self._specs = {spec.name: spec for spec in self._config.specs()}
        for worker in self.workers:
            if worker.state is not WorkerState.SERVING:
                self._declare(worker.name)
        if self._supervisor is not None:
            self._supervisor.update(self._config)

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
        await asyncio.to_thread(self._cluster.stop, self._cluster.attached(), grace)

    def _declare(self, name: str) -> None:
        """Lets the gateway know what a worker is going to be, before it says so itself."""
        worker = self.gateway.registry.workers.get(name)
        spec = self._specs.get(name)
        model = spec.config.engine.model.resolve().name if spec is not None else ""
        labels = spec.config.labels if spec is not None else {}
        if worker is None:
            self.gateway.declare(name, model=model, labels=labels)
        else:
            worker.model, worker.labels = model, labels

    def _tell(self, name: str, seen: Observation | None, lost: bool) -> None:
        if seen is None:
            self.gateway.forget(name)
            return
        if name not in self.gateway.registry.workers:
            self._declare(name)
        if seen.phase is Phase.READY:
            self.gateway.located(name, seen.address, seen.incarnation, seen.process, seen.secret)
        elif seen.phase is Phase.DRAINING:
            self.gateway.retire(name, seen.reason)
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
