"""`conclave serve`, `stop` and `workers`: the life of a fleet."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvloop
from rich.markup import escape

from ...worker.errors import ConfigError, Unavailable
from ..client import Client
from ..config import FleetConfig
from ..gateway.affinity import keep_to_one_core
from ..routing.registry import Worker, WorkerState
from ..security.settings import check_exposure
from .options import (
    DEFAULT_ADDRESS,
    Address,
    AsJson,
    Labels,
    Model,
    Names,
    TlsCa,
    TlsCert,
    TlsKey,
    Token,
    selection,
)
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
    insecure: Annotated[
        bool, typer.Option("--insecure", help="open to the network without protection")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="serve the workers of another gateway, start none")
    ] = False,
) -> None:
    """Start a fleet and serve it until SIGINT or SIGTERM, then drain it.

    SIGHUP reads the fleet file again and replaces what has changed, worker by worker.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = with_gateway(FleetConfig.load(fleet), host, port, insecure=insecure)
    check_exposure(config.gateway.host, config.gateway.security)
    if follow and not (address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError("--follow needs the Ray cluster of the other gateway: give --address")
    cluster = join(config, address)

    def reread() -> FleetConfig:
        return with_gateway(FleetConfig.load(fleet), host, port, insecure=insecure)

    if config.gateway.one_core:
        keep_to_one_core(config.gateway.port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, cluster, reread, may_lead=not follow))
    finally:
        cluster.close()


def stop(fleet: FleetFile = Path("fleet.yaml"), address: RayAddress = None) -> None:
    """End the workers that a fleet has left behind detached in a Ray cluster."""
    from ..fleet.cluster import Cluster

    config = FleetConfig.load(fleet)
    cluster = Cluster.connect(config.name, address or os.environ.get("RAY_ADDRESS") or "auto")
    try:
        copies = sorted(cluster.observe())
        with errors.status(f"draining {len(copies)} workers"):
            cluster.stop(copies, config.gateway.grace_seconds)
    finally:
        cluster.close()
    names = ", ".join(copy.worker for copy in copies)
    console.print(f"stopped: {names or 'nothing was running'}")


def workers(
    as_json: AsJson = False,
    worker: Names = None,
    model: Model = "",
    label: Labels = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """List the workers of a running fleet."""
    with Client(
        address, timeout=10.0, token=token, ca=tls_ca, certificate=tls_cert, private_key=tls_key
    ) as client:
        found = client.workers(selection(worker, model, label))
    if as_json:
        print_json(found)
    else:
        console.print(worker_table(found))


def with_gateway(
    config: FleetConfig, host: str | None, port: int | None, *, insecure: bool = False
) -> FleetConfig:
    """The fleet with another gateway address; None keeps what the file says."""
    given = {"host": host, "port": port}
    changes: dict[str, object] = {k: v for k, v in given.items() if v is not None}
    if insecure:
        changes["security"] = config.gateway.security.model_copy(update={"insecure": True})
    return config.model_copy(update={"gateway": config.gateway.model_copy(update=changes)})


def join(config: FleetConfig, address: str | None) -> "Cluster":
    """Joins or starts the Ray cluster, which takes some seconds."""
    with errors.status("reaching Ray"):
        from ..fleet.cluster import Cluster

        num_cpus = sum(spec.resources.num_cpus for spec in config.specs())
        return Cluster.connect(config.name, address, num_cpus=num_cpus)


async def _serve(
    config: FleetConfig, cluster: "Cluster", reread: Callable[[], FleetConfig], *, may_lead: bool
) -> None:
    from ..fleet.fleet import Fleet

    fleet = Fleet(config, cluster, changed=_tell, may_lead=may_lead)
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_once() -> None:
        asked_to_stop.set()
        # A second Ctrl-C does not wait for the open asks.
        loop.remove_signal_handler(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_once)
    loop.add_signal_handler(signal.SIGHUP, _update, fleet, reread)
    try:
        await fleet.start()
        console.print(f"gateway {fleet.gateway.address}")
        await _until_useless(fleet, asked_to_stop)
    finally:
        console.print("draining")
        await fleet.stop()


def _update(fleet: "Fleet", reread: Callable[[], FleetConfig]) -> None:
    """Takes the fleet file as it is now; one that is broken changes nothing."""
    try:
        fleet.update(reread())
    except ConfigError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    else:
        console.print("the fleet file has been read again")


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
