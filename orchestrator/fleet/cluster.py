"""The orchestrator's only door to Ray: reach a cluster, launch actors, see how they are, end them.

Every call here may block and belongs into the supervisor's thread, never on the gateway's loop.
"""

import logging
import math
import os
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from ...worker.actor import NAMESPACE, actor_name, launch
from ...worker.errors import ConfigError
from ..config import Resources, WorkerSpec
from .plan import Observation, Phase

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How long one look waits for actors to answer; a busy one keeps what was last known of it."""
CONNECT_SECONDS = 5.0
STARTING = Observation(
    Phase.STARTING, reason="its process is starting, or waits for free resources"
)
RESTARTING = Observation(Phase.STARTING, reason="Ray is restarting its process")

_MODULE = re.compile(r"^([a-z_]+\.)+(?=[A-Z])")
"""Of an exception's class, as the last line of a traceback gives it."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(slots=True)
class _Actor:
    handle: Any
    question: Any = None
    """The reference of the call of `endpoint` that has not been answered yet."""
    seen: Observation = STARTING


class Cluster:
    """The actors of one fleet in one Ray cluster."""

    def __init__(self, fleet: str, *, local: bool) -> None:
        self._fleet = fleet
        self._local = local
        self._actors: dict[str, _Actor] = {}
        self._gone: dict[str, Observation] = {}

    @classmethod
    def connect(cls, fleet: str, address: str | None = None, *, num_cpus: float = 0.0) -> Self:
        """Joins the cluster at `address`, or that of RAY_ADDRESS (which Ray sets inside a job), or
        starts one on this machine that ends with this process.

        A cluster started here counts as having at least `num_cpus` CPUs, so that a small machine
        runs a fleet slowly instead of waiting for ever. Raises ConfigError if it cannot be joined.
        """
        address = address or os.environ.get("RAY_ADDRESS") or None
        local = address is None
        if address is None:
            _prepare_local_cluster()
        else:
            _check_reachable(address)
        try:
            ray.init(
                address=address or "local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus)) if local else None,
                include_dashboard=False if local else None,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (RayError, ConnectionError, ValueError, RuntimeError) as error:
            where = f"the Ray cluster at {address}" if address else "a local Ray cluster"
            raise ConfigError(f"cannot join {where}: {error}") from error
        return cls(fleet, local=local)

    def close(self) -> None:
        """Leaves the cluster; one that was started here ends."""
        ray.shutdown()

    def launch(self, spec: WorkerSpec) -> None:
        """Starts a worker, or takes over the one of this name that is still there."""
        name = spec.name
        self._gone.pop(name, None)
        host = "127.0.0.1" if self._local else "auto"
        try:
            handle = launch(
                spec.config.model_copy(update={"host": host}),
                fleet=self._fleet,
                num_cpus=spec.resources.num_cpus,
                num_gpus=self._gpus(spec.resources),
                resources=dict(spec.resources.custom),
                max_restarts=spec.resources.max_restarts,
                detached=spec.detached,
            )
        except ValueError:
            handle = ray.get_actor(actor_name(self._fleet, name), namespace=NAMESPACE)
            log.info("took over the worker %s, which was there already", name)
        self._actors[name] = _Actor(handle)

    def observe(self) -> dict[str, Observation]:
        """What Ray says of every actor of the fleet, also of those launched by others."""
        self._find_others()
        for actor in self._actors.values():
            if actor.question is None:
                actor.question = actor.handle.endpoint.remote()
        questions = [actor.question for actor in self._actors.values()]
        if questions:
            ray.wait(questions, num_returns=len(questions), timeout=LOOK_SECONDS)
        for name, actor in list(self._actors.items()):
            self._read(name, actor)
        return {name: actor.seen for name, actor in self._actors.items()} | self._gone

    def stop(self, names: Collection[str], grace: float) -> None:
        """Drains the workers side by side for at most `grace` seconds, then ends them for good."""
        actors = [self._actors.pop(name) for name in names if name in self._actors]
        ready = [actor.handle for actor in actors if actor.seen.phase is Phase.READY]
        drains = [handle.drain.remote(grace) for handle in ready]
        if drains:
            ray.wait(drains, num_returns=len(drains), timeout=grace + 1.0)
        for actor in actors:
            ray.kill(actor.handle)

    def _find_others(self) -> None:
        prefix = actor_name(self._fleet, "")
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] != NAMESPACE or not entry["name"].startswith(prefix):
                continue
            name = entry["name"].removeprefix(prefix)
            if name not in self._actors and name not in self._gone:
                handle = ray.get_actor(entry["name"], namespace=NAMESPACE)
                self._actors[name] = _Actor(handle)

    def _read(self, name: str, actor: _Actor) -> None:
        ready, _ = ray.wait([actor.question], timeout=0)
        if not ready:
            return
        question, actor.question = actor.question, None
        try:
            endpoint = ray.get(question)
        except ActorUnavailableError:
            actor.seen = RESTARTING
        except ActorDiedError as error:
            del self._actors[name]
            self._gone[name] = _obituary(str(error))
        else:
            actor.seen = Observation(
                Phase.READY, endpoint.address, endpoint.incarnation, endpoint.pid
            )

    def _gpus(self, resources: Resources) -> float:
        if resources.num_gpus != "auto":
            return resources.num_gpus
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def _obituary(message: str) -> Observation:
    """Why an actor is dead for good, in one line."""
    lines = [line.strip() for line in _COLOURS.sub("", message).splitlines() if line.strip()]
    reason = _MODULE.sub("", lines[-1]) if lines else "it died"
    if "creation task" in message:
        return Observation(Phase.FAILED, reason=reason)
    return Observation(Phase.ABSENT, reason=reason)


def _check_reachable(address: str) -> None:
    """Raises ConfigError if nobody listens there, which Ray itself tells only after minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from error


def _prepare_local_cluster() -> None:
    """Environment of the processes Ray starts here: no reports home, and our package importable.

    The import root of a source checkout is a folder of links, which only this process may know.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    root = str(Path(__file__).parent.parent.parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])
