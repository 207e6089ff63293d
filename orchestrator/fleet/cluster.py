"""The orchestrator's only door to Ray: reach a cluster, launch actors, see how they are, end them.

Every call here may block and belongs into the supervisor's thread, never on the gateway's loop.
"""

import logging
import math
import os
import secrets
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import ray
from pydantic import SecretStr
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...worker.actor import NAMESPACE, actor_name, launch
from ...worker.config import fleet_secret_given
from ...worker.errors import ConfigError
from ..config import Resources, WorkerSpec
from .obituary import obituary
from .plan import Copy, Observation, Phase

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How long one look waits for actors to answer; a busy one keeps what was last known of it."""
CONNECT_SECONDS = 5.0
STARTING = Observation(
    Phase.STARTING, reason="its process is starting, or waits for free resources"
)
RESTARTING = Observation(Phase.STARTING, reason="Ray is restarting its process")


@dataclass(slots=True)
class _Actor:
    handle: Any
    attached: bool = False
    """It is to end with this process."""
    question: Any = None
    """The reference of the call of `endpoint` that has not been answered yet."""
    drained: Any = None
    """The reference of the call of `drain`, if there was one."""
    seen: Observation = STARTING


class _Lease:
    """Its name is what counts: who has made it leads the fleet."""


class Cluster:
    """The actors of one fleet in one Ray cluster."""

    def __init__(self, fleet: str, *, local: bool) -> None:
        self._fleet = fleet
        self._local = local
        self._secret = fleet_secret_given() or SecretStr(secrets.token_urlsafe(32))
        """Of the workers launched here; any worker's own comes with its endpoint."""
        self._actors: dict[Copy, _Actor] = {}
        self._gone: dict[Copy, Observation] = {}
        self._ended: set[Any] = set()
        """Ray's ids of the actors that have come to their end."""
        self._lease: Any = None
        self._requested: list[dict[str, float]] | None = None

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

    def lead(self) -> bool:
        """Whether this process starts and stops the fleet's workers; takes the lead if it is free.

        The lead is a named actor that ends with the process that made it, however that ends.
        """
        if self._local or self._lease is not None:
            return True
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        try:
            self._lease = (
                ray.remote(_Lease)
                .options(
                    name=f"{self._fleet}@lead",
                    namespace=NAMESPACE,
                    num_cpus=0,
                    max_restarts=-1,
                    scheduling_strategy=here,
                )
                .remote()
            )
        except ValueError:
            return False
        log.info("this process leads the fleet %s", self._fleet)
        return True

    def launch(self, spec: WorkerSpec) -> None:
        """Starts a worker, or takes over the one of this name and version that is still there."""
        copy = Copy(spec.name, spec.version)
        self._gone.pop(copy, None)
        host = "127.0.0.1" if self._local else "auto"
        try:
            handle = launch(
                spec.config.model_copy(update={"host": host, "fleet_secret": self._secret}),
                fleet=self._fleet,
                version=spec.version,
                num_cpus=spec.resources.num_cpus,
                num_gpus=self._gpus(spec.resources),
                resources=dict(spec.resources.custom),
                max_restarts=spec.resources.max_restarts,
                detached=spec.detached,
            )
        except ValueError:
            self._find_others()
            log.info("took over the worker %s, which was there already", spec.name)
        else:
            self._actors[copy] = _Actor(handle, attached=not spec.detached)

    def observe(self) -> dict[Copy, Observation]:
        """What Ray says of every actor of the fleet, also of those launched by others."""
        self._find_others()
        for actor in self._actors.values():
            if actor.question is None:
                actor.question = actor.handle.endpoint.remote()
        questions = [actor.question for actor in self._actors.values()]
        if questions:
            ray.wait(questions, num_returns=len(questions), timeout=LOOK_SECONDS)
        for copy, actor in list(self._actors.items()):
            if actor.drained is not None and ray.wait([actor.drained], timeout=0)[0]:
                self._end(copy)
            else:
                self._read(copy, actor)
        return {copy: actor.seen for copy, actor in self._actors.items()} | self._gone

    def retire(self, copy: Copy, grace: float | None) -> None:
        """Begins to drain a worker; a later `observe` ends it when it is done. None has no end."""
        actor = self._actors.get(copy)
        if actor is None or actor.drained is not None:
            return
        if actor.seen.phase is Phase.STARTING:
            self._end(copy)
            return
        actor.drained = actor.handle.drain.remote(grace)
        actor.seen = replace(actor.seen, phase=Phase.DRAINING)

    def stop(self, copies: Collection[Copy], grace: float) -> None:
        """Drains the workers side by side for at most `grace` seconds, then ends them for good."""
        copies = [copy for copy in copies if copy in self._actors]
        ready = [c for c in copies if self._actors[c].seen.phase in (Phase.READY, Phase.DRAINING)]
        drains = [self._actors[copy].handle.drain.remote(grace) for copy in ready]
        if drains:
            ray.wait(drains, num_returns=len(drains), timeout=grace + 1.0)
        for copy in copies:
            self._end(copy)

    def attached(self) -> list[Copy]:
        """The workers that are to end with this process."""
        return [copy for copy, actor in self._actors.items() if actor.attached]

    def room(self, spec: WorkerSpec) -> bool:
        """Whether a node has room for one more such worker now."""
        bundle = self._bundle(spec.resources)
        return any(
            all(free.get(name, 0.0) >= amount for name, amount in bundle.items())
            for free in available_resources_per_node().values()
        )

    def request(self, specs: Sequence[WorkerSpec]) -> None:
        """Asks the autoscaler for nodes that hold all these; none takes the request back.

        The request is the cluster's only one of its kind and stays until the next, so it is taken
        back as soon as it is met. Without an autoscaler nobody reads it.
        """
        bundles = [self._bundle(spec.resources) for spec in specs]
        if not self._local and bundles != self._requested:
            request_resources(bundles=bundles)
            self._requested = bundles

    def _find_others(self) -> None:
        prefix = actor_name(self._fleet, "", "").removesuffix("@")
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] != NAMESPACE or not entry["name"].startswith(prefix):
                continue
            worker, _, version = entry["name"].removeprefix(prefix).partition("@")
            copy = Copy(worker, version)
            if copy in self._actors:
                continue
            try:
                handle = ray.get_actor(entry["name"], namespace=NAMESPACE)
            except ValueError:
                continue  # it has ended since
            # Ray lists an actor for a moment after its end.
            if handle._actor_id not in self._ended:
                self._gone.pop(copy, None)
                self._actors[copy] = _Actor(handle)

    def _read(self, copy: Copy, actor: _Actor) -> None:
        ready, _ = ray.wait([actor.question], timeout=0)
        if not ready:
            return
        question, actor.question = actor.question, None
        try:
            endpoint = ray.get(question)
        except ActorUnavailableError:
            actor.seen = RESTARTING
        except ActorDiedError as error:
            self._forget(copy)
            self._gone[copy] = obituary(str(error))
        else:
            leaves = endpoint.draining or actor.drained is not None
            actor.seen = Observation(
                Phase.DRAINING if leaves else Phase.READY,
                endpoint.address,
                endpoint.incarnation,
                endpoint.pid,
                reason="ends its last answers" if leaves else "",
                open_sequences=endpoint.open_sequences,
                secret=endpoint.secret,
            )

    def _end(self, copy: Copy) -> None:
        """Ends an actor for good."""
        ray.kill(self._actors[copy].handle)
        self._forget(copy)

    def _forget(self, copy: Copy) -> None:
        self._ended.add(self._actors.pop(copy).handle._actor_id)

    def _bundle(self, resources: Resources) -> dict[str, float]:
        bundle = {"CPU": resources.num_cpus, "GPU": self._gpus(resources), **resources.custom}
        return {name: amount for name, amount in bundle.items() if amount > 0}

    def _gpus(self, resources: Resources) -> float:
        if resources.num_gpus != "auto":
            return resources.num_gpus
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


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
