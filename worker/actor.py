"""The Ray door of a worker: a named actor that owns one device and keeps a gRPC server alive.

Ray gives it a place, restarts it when it dies and tells where it is; no token rides through Ray.
After a restart the process has a new port and a new incarnation, so whoever wants to talk to it
asks `endpoint` again. The engine is imported inside the actor, so that the orchestrator can name
and launch actors without loading torch.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import ray

from .config import WorkerConfig

NAMESPACE = "conclave"
"""Ray namespace of all our actors."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a worker listens."""

    address: str
    """host:port"""
    incarnation: str
    """Changes with every start of the process."""
    pid: int
    node_ip: str
    open_sequences: int = 0
    """Answers that run or wait there, whoever asked for them."""
    draining: bool = False
    """An orchestrator has told it to drain; it will not serve again."""
    secret: str = field(default="", repr=False)
    """What the worker wants its callers to show. It travels through Ray because Ray is trusted
    (whoever can ask an actor can run code here), and so every gateway of the fleet learns it, also
    one that took a detached worker over."""


def actor_name(fleet: str, worker: str, version: str) -> str:
    """The name under which Ray knows a worker that runs this version of its settings."""
    return f"{fleet}/{worker}@{version}"


def launch(
    config: WorkerConfig,
    *,
    fleet: str,
    version: str,
    num_cpus: float,
    num_gpus: float,
    resources: dict[str, float],
    max_restarts: int,
    detached: bool,
) -> Any:
    """Create a worker's actor and return its handle at once, before the model is loaded.

    Args:
        config: the worker's settings.
        fleet: name of the fleet, part of the actor's name.
        version: of the worker's settings, part of the actor's name; two versions may live at once.
        num_cpus, num_gpus, resources: what Ray reserves for it.
        max_restarts: how often Ray starts it again after a death; -1 for ever.
        detached: whether it outlives the job that created it.

    Raises:
        ValueError: an actor with this name is alive.
    """
    options: dict[str, Any] = {
        "name": actor_name(fleet, config.name, version),
        "namespace": NAMESPACE,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "resources": resources,
        "max_restarts": max_restarts,
        # A call that was lost with the process is asked again by whoever wanted the answer.
        "max_task_retries": 0,
        # `endpoint` must answer while `drain` waits.
        "max_concurrency": 4,
    }
    if detached:
        options["lifetime"] = "detached"
    return ray.remote(WorkerActor).options(**options).remote(config)


class WorkerActor:
    """One worker's process; creating it loads the model and returns when it serves."""

    def __init__(self, config: WorkerConfig) -> None:
        from .serving.server import WorkerServer

        if config.host == "auto":
            config = config.model_copy(update={"host": ray.util.get_node_ip_address()})
        self._draining = False
        # An engine that died cannot be mended from inside: leave, and let Ray start a new process.
        self._server = WorkerServer(config, on_broken=lambda: os._exit(1))

    def endpoint(self) -> Endpoint:
        """Where this worker listens; answers only once it serves."""
        secret = self._server.config.fleet_secret
        load = self._server.engine.load
        return Endpoint(
            address=self._server.address,
            incarnation=self._server.incarnation,
            pid=os.getpid(),
            node_ip=ray.util.get_node_ip_address(),
            open_sequences=load.running + load.waiting,
            draining=self._draining,
            secret=secret.get_secret_value() if secret is not None else "",
        )

    def drain(self, grace: float | None) -> None:
        """Refuse new asks and wait at most `grace` seconds for the open ones; None has no end."""
        self._draining = True
        self._server.drain(grace)

    def pid(self) -> int:
        """Process id on its node."""
        return os.getpid()
