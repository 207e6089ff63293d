"""One worker by hand, without Ray: `python -m conclave.worker CHECKPOINT --port 50052`."""

import logging
import signal
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .config import EngineConfig, WorkerConfig, fleet_secret_given
from .errors import ConclaveError
from .serving.server import WorkerServer

_errors = Console(stderr=True)


def serve(
    model: Annotated[Path, typer.Argument(help="checkpoint folder")],
    name: Annotated[str, typer.Option(help="name of the worker")] = "worker",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free port")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    max_context: Annotated[int | None, typer.Option(help="longest prompt plus answer")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="open to the network without CONCLAVE_FLEET_SECRET")
    ] = False,
) -> None:
    """Serve one checkpoint over gRPC until SIGINT or SIGTERM, then drain.

    With CONCLAVE_FLEET_SECRET in the environment it answers only callers that show it.
    """
    logging.basicConfig(level=logging.INFO)
    try:
        engine = EngineConfig.model_validate(
            {
                "model": model,
                "device": device,
                "dtype": dtype,
                "max_context": max_context,
                "threads": threads,
            }
        )
        config = WorkerConfig(
            name=name,
            engine=engine,
            host=host,
            port=port,
            fleet_secret=fleet_secret_given(),
            insecure=insecure,
        )
        with Progress(TextColumn("loading"), BarColumn(), MofNCompleteColumn()) as bar:
            task = bar.add_task("loading", total=None)
            server = WorkerServer(
                config, lambda done, total: bar.update(task, completed=done, total=total)
            )
    except (ConclaveError, ValidationError, OSError) as error:
        _errors.print(f"[red]error:[/red] {error}")
        raise typer.Exit(1) from None
    print(server.address, flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    server.stop(grace=30.0)


if __name__ == "__main__":
    # Blocked before any thread starts, so that only sigwait sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    typer.run(serve)
