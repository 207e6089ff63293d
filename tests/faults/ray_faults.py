"""A fleet in a real Ray cluster of two nodes on this machine, and the faults that need one.

There is no registry process in Conclave's design: where workers are, the gateway hears from its
supervisor, which asks Ray. So the registry's fault is Ray's own control store (GCS) that hangs, so
that every call of the supervisor fails or blocks for a while. Killing it for good would be another
thing: without Redis behind it, Ray itself gives the whole cluster up then.

Every Ray process here was started here and is ended by its own id.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml

from conclave.protos import generation_pb2 as pb
from conclave.worker.config import FLEET_SECRET, FLEET_SECRET_KEY
from tests.cluster.conftest import MODEL, Ground

from .arena import Arena, Fault
from .crowd import mixture
from .ledger import Ledger

LENGTHS = (1, 8, 24, 48)
PACKAGES = ("vim", "git", "gimp", "bash")
REGISTRY_SECONDS = 5.0
FLEET = "faulty"
SECRET = "the fault suite's own secret"


class RayArena(Arena):
    """Two workers, one on the head and one on a second node, behind `conclave serve`.

    The workers are detached: they outlive the process that serves them.
    """

    heal_seconds = 120.0
    metadata = ((FLEET_SECRET_KEY, SECRET),)

    @classmethod
    async def open(cls, ledger: Ledger) -> Self:
        """Head, second node, and the fleet; all workers serve."""
        ground = Ground()
        ports = [free_port() for _ in range(2)]
        prompts = [pb.Prompt(text=f"Package: {name}\nLanguage: en\n\n") for name in PACKAGES]
        pool = mixture(prompts, LENGTHS, most_outputs=2)
        arena = cls(ledger, f"127.0.0.1:{ports[1]}", pool)
        arena.ground, arena.ray_address = ground, f"127.0.0.1:{ports[0]}"
        arena.stack.push_async_callback(asyncio.to_thread, ground.clean_up)
        await arena.start_head(ports[0])
        arena.node = arena.start_node()
        arena.server = arena.serve()
        if not await arena.until(arena.everyone_serves):
            raise AssertionError(f"the fleet does not serve:\n{ground.log('serve-1.log')}")
        return arena

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ground: Ground
        self.ray_address = ""
        self.head: subprocess.Popen[bytes]
        self.node: subprocess.Popen[bytes]
        self.server: subprocess.Popen[bytes]
        self._starts = 0

    async def start_head(self, port: int) -> None:
        """The cluster's first node."""
        self.head = self.ground.start(
            "head.log",
            *("ray", "start", "--head", "--block", "--num-cpus=1", f"--port={port}"),
            *("--node-ip-address=127.0.0.1", "--include-dashboard=false"),
            # A node that is gone refuses the line: Ray believes it after five tries, not 15 s.
            RAY_health_check_period_ms="500",
        )

        async def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        if not await self.until(listens):
            raise AssertionError(f"Ray's head does not start:\n{self.ground.log('head.log')}")

    def start_node(self) -> "subprocess.Popen[bytes]":
        """A second node of the cluster, on this machine."""
        return self._start(
            "node", "ray", "start", "--block", "--num-cpus=1", f"--address={self.ray_address}"
        )

    def serve(self) -> "subprocess.Popen[bytes]":
        """The process with gateway and supervisor."""
        port = self.address.rpartition(":")[2]
        return self._start(
            "serve",
            *(sys.executable, "-m", "conclave.orchestrator.cli", "serve"),
            *("--fleet", str(self._fleet_file()), "--address", self.ray_address, "--port", port),
            **{FLEET_SECRET: SECRET},
        )

    async def everyone_serves(self) -> bool:
        """As everywhere, and both workers are known."""
        return len(await self.workers()) == 2 and await super().everyone_serves()

    async def processes(self) -> dict[str, int]:
        """The process id of each worker."""
        return {name: worker.process for name, worker in (await self.workers()).items()}

    def _start(self, name: str, *command: str, **environment: str) -> "subprocess.Popen[bytes]":
        self._starts += 1
        return self.ground.start(f"{name}-{self._starts}.log", *command, **environment)

    def _fleet_file(self) -> Path:
        engine = {"model": str(MODEL), "device": "cpu", "threads": 1, "max_sequences": 8}
        group = {
            "name": "w",
            "replicas": 2,
            "engine": engine | {"kv_tokens": 4096, "max_context": 256},
            # More than half a node, so that each node has one.
            "resources": {"num_cpus": 0.6, "num_gpus": 0},
            "detached": True,
        }
        path = self.ground.folder / "faulty.yaml"
        path.write_text(yaml.safe_dump({"name": FLEET, "workers": [group]}))
        return path


async def kill_actor(arena: RayArena) -> str:
    """SIGKILL of an actor's process; Ray starts it again."""
    before = await arena.processes()
    name = arena.random.choice(sorted(before))
    os.kill(before[name], signal.SIGKILL)
    return await _reborn(arena, name, before[name])


async def remove_node(arena: RayArena) -> str:
    """SIGKILL of a node's raylet; its worker dies with it, and a new node joins a moment later."""
    (raylet,) = named(arena.node.pid, "raylet")
    before = await arena.processes()
    (name,) = [name for name, pid in before.items() if parent(pid) == raylet]
    os.kill(raylet, signal.SIGKILL)
    await asyncio.to_thread(arena.node.wait, 60)
    arena.node = arena.start_node()
    return await _reborn(arena, name, before[name])


async def hang_registry(arena: RayArena) -> str:
    """SIGSTOP of Ray's control store for a while: the supervisor is blind, the streams go on."""
    (store,) = named(arena.head.pid, "gcs_server")
    os.kill(store, signal.SIGSTOP)
    try:
        before, began = arena.callers.tokens_seen, time.monotonic()
        await asyncio.sleep(REGISTRY_SECONDS)
        seconds = time.monotonic() - began
        rate = (arena.callers.tokens_seen - before) / seconds
        return f"{rate:.0f} tokens/s came while it hung {seconds:.1f} s" if rate else ""
    finally:
        os.kill(store, signal.SIGCONT)


async def kill_server(arena: RayArena) -> str:
    """SIGKILL of `conclave serve`, and a new one that finds the detached workers again."""
    before = await arena.processes()
    os.killpg(arena.server.pid, signal.SIGKILL)
    await asyncio.to_thread(arena.server.wait, 60)
    arena.server = arena.serve()
    if not await arena.until(arena.everyone_serves):
        return ""
    return "the same processes serve" if await arena.processes() == before else ""


async def _reborn(arena: RayArena, name: str, pid: int) -> str:
    async def is_new() -> bool:
        return (await arena.processes()).get(name) not in (None, 0, pid)

    return f"{name} has a new process" if await arena.until(is_new) else ""


def named(root: int, name: str) -> list[int]:
    """The processes of a name among a process's descendants."""
    return [pid for pid in descendants(root) if _stat(pid)[0] == name]


def descendants(root: int) -> Iterator[int]:
    """A process's children, theirs, and so on."""
    for task in Path(f"/proc/{root}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from descendants(child)


def parent(pid: int) -> int:
    """The id of a process's parent."""
    return int(_stat(pid)[2])


def _stat(pid: int) -> tuple[str, str, str]:
    """Name, state and parent of a process."""
    name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    state, above, *_ = rest.split()
    return name, state, above


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


FAULTS = (
    Fault("ray: kill an actor", kill_actor, where="ray"),
    Fault("ray: hang the registry", hang_registry, where="ray"),
    Fault("ray: kill the server", kill_server, where="ray", allows=("UNAVAILABLE",)),
    Fault("ray: remove a node", remove_node, where="ray"),
)
