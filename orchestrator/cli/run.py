"""`conclave serve`, `stop` and `workers`: the life of a fleet."""

import asyncio
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvloop
from rich.markup import escape

from ...worker.errors import Unavailable
from ..client import Client
from ..config import FleetConfig
from ..gateway.affinity import keep_to_one_core
from ..routing.registry import Worker, WorkerState
from .options import DEFAULT_ADDRESS, Address, AsJson, Labels, Model, Names, selection
from .output import console, errors, print_json, state_text, worker_table

if TYPE_CHECKING:
    from ..fleet.cluster import Cluster
    from ..fleet.fleet import Fleet

FleetFile = Annotated[Path, typer.Option(help="the fleet file")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray cluster to join; default: RAY_ADDRESS, else a cluster that is started here",
    ),
]


def serve(
    fleet: FleetFile = Path("fleet.yaml"),
    address: RayAddress = None,
    host: Annotated[str | None, typer.Option(help="overrides gateway.host")] = None,
    port: Annotated[int | None, typer.Option(min=0, help="overrides gateway.port")] = None,
) -> None:
    """Start a fleet and serve it until SIGINT or SIGTERM, then drain it."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = with_gateway(FleetConfig.load(fleet), host, port)
    cluster = join(config, address)
    if config.gateway.one_core:
        keep_to_one_core(config.gateway.port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, cluster))
    finally:
        cluster.close()


def stop(fleet: FleetFile = Path("fleet.yaml"), address: RayAddress = None) -> None:
    """End the workers that a fleet has left behind detached in a Ray cluster."""
    from ..fleet.cluster import Cluster

    config = FleetConfig.load(fleet)
    cluster = Cluster.connect(config.name, address or os.environ.get("RAY_ADDRESS") or "auto")
    try:
        names = sorted(cluster.observe())
        with errors.status(f"draining {len(names)} workers"):
            cluster.stop(names, config.gateway.grace_seconds)
    finally:
        cluster.close()
    console.print(f"stopped: {', '.join(names) or 'nothing was running'}")


def workers(
    as_json: AsJson = False,
    worker: Names = None,
    model: Model = "",
    label: Labels = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """List the workers of a running fleet."""
    with Client(address, timeout=10.0) as client:
        found = client.workers(selection(worker, model, label))
    if as_json:
        print_json(found)
    else:
        console.print(worker_table(found))


def with_gateway(config: FleetConfig, host: str | None, port: int | None) -> FleetConfig:
    """The fleet with another gateway address; None keeps what the file says."""
    given = {"host": host, "port": port}
    changes = {key: value for key, value in given.items() if value is not None}
    return config.model_copy(update={"gateway": config.gateway.model_copy(update=changes)})


def join(config: FleetConfig, address: str | None) -> "Cluster":
    """Joins or starts the Ray cluster, which takes some seconds."""
    with errors.status("reaching Ray"):
        from ..fleet.cluster import Cluster

        num_cpus = sum(spec.resources.num_cpus for spec in config.specs())
        return Cluster.connect(config.name, address, num_cpus=num_cpus)


async def _serve(config: FleetConfig, cluster: "Cluster") -> None:
    from ..fleet.fleet import Fleet

    fleet = Fleet(config, cluster, changed=_tell)
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_once() -> None:
        asked_to_stop.set()
        # A second Ctrl-C does not wait for the open asks.
        loop.remove_signal_handler(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_once)
    try:
        await fleet.start()
        console.print(f"gateway {fleet.gateway.address}")
        await _until_useless(fleet, asked_to_stop)
    finally:
        console.print("draining")
        await fleet.stop()


async def _until_useless(fleet: "Fleet", asked_to_stop: asyncio.Event) -> None:
    """Returns when asked to stop; raises Unavailable if no worker could be started."""
    settled = asyncio.create_task(fleet.settled())
    stopping = asyncio.create_task(asked_to_stop.wait())
    try:
        await asyncio.wait((settled, stopping), return_when=asyncio.FIRST_COMPLETED)
        if settled.done() and not settled.result() and not stopping.done():
            raise Unavailable("no worker could be started; the reasons stand above")
        await stopping
    finally:
        settled.cancel()
        with suppress(asyncio.CancelledError):
            await settled


def _tell(worker: Worker) -> None:
    """One line for each new state of a worker."""
    reason = f": {escape(worker.reason)}" if worker.reason else ""
    where = ""
    if worker.state is WorkerState.SERVING:
        where = f" at {worker.address}, {worker.device}, process {worker.process}"
    console.print(f"worker {worker.name} {state_text(worker.state)}{where}{reason}", soft_wrap=True)
