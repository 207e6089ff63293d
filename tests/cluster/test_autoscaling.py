"""A load wave on a cluster whose GPU nodes come and go, then two gateways, one of which dies."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conclave.orchestrator.client import AsyncClient, Client

from .cloud import Cloud
from .traffic import PROMPT, Traffic, counters

CAPACITY = 4


@pytest.fixture(scope="module")
def cloud(ground: Any) -> Iterator[Cloud]:
    """A Ray cluster that may have three nodes with a GPU each."""
    cloud = Cloud(ground, gpu_nodes=3)
    yield cloud
    cloud.close()


@pytest.fixture(scope="module")
def fleet(ground: Any) -> Path:
    """From no worker to three, each on a GPU of its own."""
    group = {
        "min": 0,
        "max": 3,
        "target_load": 1.0,
        "scale_down_after_seconds": 5,
        "resources": {"num_cpus": 1, "num_gpus": 1},
        "detached": True,
    }
    path: Path = ground.fleet_file(
        "wave", group=group, gateway={"wait_for_worker_seconds": 120}, max_sequences=CAPACITY
    )
    return path


@pytest.fixture(scope="module")
def leader(ground: Any, cloud: Cloud, fleet: Path) -> "subprocess.Popen[bytes]":
    """The first gateway."""
    process: subprocess.Popen[bytes] = ground.serve("wave.log", fleet, "--address", cloud.address)
    return process


def incarnations(client: Client) -> dict[str, str]:
    return {worker.name: worker.incarnation for worker in client.workers()}


async def wave(address: str, cloud: Cloud) -> tuple[Traffic, list[int]]:
    """Ten callers until three workers serve, then one caller until one is left."""
    async with AsyncClient(address, timeout=200.0) as client:
        traffic = Traffic(client, tokens=60)
        assert not await traffic.serving() and cloud.gpu_nodes() == 0
        sizes = [0]

        async def until(workers: int) -> None:
            while len(serving := await traffic.serving()) != workers or (
                cloud.gpu_nodes() != workers
            ):
                if sizes[-1] != len(serving):
                    sizes.append(len(serving))
                await asyncio.sleep(0.2)
            if sizes[-1] != workers:
                sizes.append(workers)

        async with traffic.flow(10), asyncio.timeout(120):
            await until(3)
            # Every new worker gets its share.
            while len(set(traffic.answers[-12:])) < 3:
                await asyncio.sleep(0.2)
        async with traffic.flow(1), asyncio.timeout(60):
            await until(1)
        return traffic, sizes


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("leader")
def test_a_load_wave_brings_workers_and_nodes_and_lets_them_go(ground: Any, cloud: Cloud) -> None:
    address = ground.logged("wave.log", "gateway ")
    traffic, sizes = asyncio.run(wave(address, cloud))
    assert not traffic.failures, f"{traffic.failures}\n{ground.log('wave.log')}"
    assert sizes[0] == 0 and max(sizes) == 3 and sizes[-1] == 1
    counted = counters(address)
    assert counted.failures == 0
    assert counted.resumes == 0, "a drained worker must end its streams itself"


@pytest.mark.timeout(200)
def test_two_gateways_and_the_one_that_leads_dies(
    ground: Any, cloud: Cloud, fleet: Path, leader: "subprocess.Popen[bytes]"
) -> None:
    follower = ground.serve("second.log", fleet, "--address", cloud.address)
    addresses = [ground.logged(log, "gateway ") for log in ("wave.log", "second.log")]
    with Client(addresses[0]) as client, Client(addresses[1]) as second:
        # An ask keeps the last worker, or brings it back.
        assert client.generate(PROMPT, max_tokens=4).worker
        ground.serving(second, 1, "second.log")
        assert incarnations(second) == incarnations(client)
        assert second.generate(PROMPT, max_tokens=4).worker
        assert "leads the fleet" in ground.log("wave.log")
        assert "leads the fleet" not in ground.log("second.log")
        before = incarnations(second)
        leader.kill()
        leader.wait()
        assert second.generate(PROMPT, max_tokens=4).worker in before
        ground.until(lambda: "leads the fleet" in ground.log("second.log"), seconds=60)
        assert incarnations(second) == before
    ended = ground.start(
        "stop.log",
        *(sys.executable, "-m", "conclave.orchestrator.cli", "stop", "--fleet", str(fleet)),
        *("--address", cloud.address),
    )
    assert ended.wait(60) == 0, ground.log("stop.log")
    assert re.match(r"stopped: w-\d", ground.log("stop.log"))
    ground.until(lambda: cloud.gpu_nodes() == 0, lambda: ground.log("second.log"), seconds=60)
    follower.terminate()
    assert follower.wait(60) == 0, ground.log("second.log")
