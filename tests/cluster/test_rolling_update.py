"""A served fleet goes to another checkpoint while it is asked without a pause."""

import asyncio
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from conclave.orchestrator.client import AsyncClient, Client

from .traffic import Traffic, counters


def load_again(ground: Any, served: Any, model: Path) -> None:
    ground.fleet_file("served", model=str(model))
    served.send_signal(signal.SIGHUP)


@pytest.mark.timeout(300)
def test_a_broken_checkpoint_leaves_the_fleet_as_it_is(
    client: Client, served: Any, ground: Any
) -> None:
    ground.serving(client, 2, "serve.log")
    before = client.workers()
    load_again(ground, served, ground.folder / "nothing")
    ground.until(
        lambda: "the update stops: worker w-0" in ground.log("serve.log"),
        lambda: ground.log("serve.log"),
        seconds=60,
    )
    log = ground.log("serve.log")
    assert "CheckpointError" in log and "Traceback" not in log
    after = client.workers()
    assert [w.incarnation for w in after] == [w.incarnation for w in before], log
    (ground.folder / "served.yaml").write_text("workers: [")
    served.send_signal(signal.SIGHUP)
    ground.until(lambda: "is not YAML" in ground.log("serve.log"), seconds=10)


@pytest.mark.timeout(300)
def test_a_new_checkpoint_without_a_failed_request(
    client: Client, served: Any, ground: Any
) -> None:
    new = ground.folder / "debian-8m-new"
    shutil.copytree(ground.model, new)
    counted = counters(client.address)

    async def scenario() -> Traffic:
        async with AsyncClient(client.address, timeout=100.0) as caller:
            traffic = Traffic(caller, tokens=60)
            before = await traffic.serving()
            async with traffic.flow(4), asyncio.timeout(150):
                while len(set(traffic.answers)) < 2:
                    await asyncio.sleep(0.1)
                load_again(ground, served, new)
                while set(before.values()) & set((await traffic.serving()).values()):
                    assert await traffic.serving(), "nobody serves"
                    await asyncio.sleep(0.1)
            assert set(await traffic.serving()) == set(before), "names stay"
            return traffic

    traffic = asyncio.run(scenario())
    assert not traffic.failures, f"{traffic.failures}\n{ground.log('serve.log')}"
    assert {worker.model for worker in client.workers()} == {"debian-8m-new"}
    after = counters(client.address)
    assert after.failures == counted.failures
    assert after.resumes == counted.resumes, "a drained worker must end its streams itself"
