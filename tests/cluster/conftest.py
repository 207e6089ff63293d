"""A real fleet in a real Ray cluster on this machine, as a user would start it.

Every Ray here lives in a temporary folder and home of its own and is ended by its own process id,
so that these tests disturb no other Ray on the machine.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from conclave.orchestrator.client import Client, WorkerState

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "debian-8m"
START_SECONDS = 150.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.cluster)
    # Last, because the fleet that these share would take its part of the machine from all others.
    items[:] = [item for item in items if item not in own] + own


class Ground:
    """A temporary home for Ray processes, and helpers to start and await them."""

    model = MODEL
    root = ROOT
    secret = secrets.token_urlsafe(32)
    """Of the fleet that `client` speaks to, for tests that speak to its workers."""

    def __init__(self) -> None:
        # Short, because Ray puts Unix sockets deep into it.
        self.folder = Path(tempfile.mkdtemp(prefix="cv", dir="/tmp"))
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith("RAY_")
        } | {
            "HOME": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(ROOT / ".root"),
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Workers that outlive their fleet would else hold a node up for half a minute.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "NO_COLOR": "1",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def fleet_file(
        self,
        name: str,
        *,
        group: Mapping[str, Any] = {},
        gateway: Mapping[str, Any] = {},
        **engine: Any,
    ) -> Path:
        """A fleet of two small workers, or what else the group's keys make of it."""
        knobs = {
            "model": str(MODEL),
            "device": "cpu",
            "threads": 1,
            "max_sequences": 8,
            "kv_tokens": 16384,
        }
        workers: dict[str, Any] = {
            "name": "w",
            "engine": knobs | engine,
            "resources": {"num_cpus": 0.5, "num_gpus": 0},
        }
        workers |= {**group} if group else {"replicas": 2}
        # A worker that shares two cores with all others may be silent for a while.
        door = {"port": 0, "grace_seconds": 5, "hang_seconds": 20, **gateway}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "gateway": door, "workers": [workers]}))
        return path

    def serve(
        self, log: str, fleet: Path, *options: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Starts `conclave serve`."""
        words = ("-m", "conclave.orchestrator.cli", "serve", "--fleet", str(fleet), *options)
        return self.start(log, sys.executable, *words, **environment)

    def start(self, log: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a process in a group of its own, writing to a log file here."""
        with (self.folder / log).open("wb") as output:
            process = subprocess.Popen(
                command,
                env=self.environment | environment,
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")

    def logged(self, name: str, start: str) -> str:
        """Waits for a line that starts so, and returns the rest of it."""
        found: list[str] = []

        def look() -> bool:
            lines = self.log(name).splitlines()
            found[:] = [line.removeprefix(start) for line in lines if line.startswith(start)]
            return bool(found)

        self.until(look, lambda: self.log(name))
        return found[0].strip()

    @staticmethod
    def until(
        holds: Callable[[], bool],
        explain: Callable[[], str] = lambda: "",
        seconds: float = START_SECONDS,
    ) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, explain()
            time.sleep(0.05)

    def serving(self, client: Client, count: int, log: str) -> None:
        """Waits until so many workers serve."""

        def enough() -> bool:
            return sum(w.state is WorkerState.SERVING for w in client.workers()) >= count

        self.until(enough, lambda: f"{client.workers()}\n{self.log(log)}")

    def clean_up(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    assert (MODEL / "config.json").exists(), "the shipped model is missing; see examples/"
    ground = Ground()
    try:
        yield ground
    finally:
        ground.clean_up()


@pytest.fixture(scope="session")
def served(ground: Ground) -> Iterator[subprocess.Popen[bytes]]:
    """`conclave serve` with a fleet of two workers."""
    fleet = ground.fleet_file("served")
    process = ground.serve("serve.log", fleet, CONCLAVE_FLEET_SECRET=ground.secret)
    yield process
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, ground.log("serve.log")


@pytest.fixture(scope="session")
def client(ground: Ground, served: subprocess.Popen[bytes]) -> Iterator[Client]:
    """A client of that fleet."""
    address = ground.logged("serve.log", "gateway ")
    with Client(address) as client:
        ground.serving(client, 2, "serve.log")
        yield client
