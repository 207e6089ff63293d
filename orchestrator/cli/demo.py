"""`conclave demo`: three CPU workers with three small models answer alone, then as an ensemble.

Everything is real: a Ray cluster on this machine, one actor a worker, a gateway, and every token
through gRPC twice. Takes about half a minute.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from ...worker.errors import ConfigError, Unavailable
from ..client import AsyncClient, Completion, Options
from ..config import FleetConfig
from .output import console, errors, member_table, worker_table
from .run import join, with_gateway

if TYPE_CHECKING:
    from ..fleet.cluster import Cluster

FLEET_FILE = "fleet.yaml"
ALONE = (("vim", "en"), ("git", "de"), ("python3-numpy", "fr"))
"""Packages and languages for one worker each."""
TOGETHER = ("gimp", "it")
"""For all workers, token by token."""
ENSEMBLE = "together"
"""A preset of the fleet file."""
START_SECONDS = 180.0


def demo(
    max_tokens: Annotated[int, typer.Option(min=1, help="of each answer")] = 72,
) -> None:
    """Start the bundled fleet here, answer in three languages and as an ensemble, shut down."""
    config = with_gateway(FleetConfig.load(shipped_fleet()), host=None, port=0)
    cluster = join(config, None)
    try:
        asyncio.run(_demonstrate(config, cluster, max_tokens))
    finally:
        cluster.close()


def shipped_fleet() -> Path:
    """The fleet file of the source tree. Raises ConfigError if it is not there."""
    # One level up in a checkout, three where its import root was copied with it.
    for folder in Path(__file__).resolve().parents:
        path = folder / FLEET_FILE
        if not path.exists():
            continue
        for spec in FleetConfig.load(path).specs():
            if not (spec.config.engine.model / "config.json").exists():
                raise ConfigError(f"{path} names {spec.config.engine.model}, which has no model")
        return path
    raise ConfigError(
        f"the demo needs {FLEET_FILE} and examples/models of the source tree; run it from a clone"
    )


async def _demonstrate(config: FleetConfig, cluster: "Cluster", max_tokens: int) -> None:
    from ..fleet.fleet import Fleet

    fleet = Fleet(config, cluster)
    try:
        await fleet.start()
        with errors.status(f"starting {len(fleet.workers)} workers"):
            serves = await asyncio.wait_for(fleet.settled(), START_SECONDS)
        console.print(f"gateway {fleet.gateway.address}\n", worker_table(fleet.workers), sep="\n")
        if not serves:
            raise Unavailable("no worker could be started; the reasons stand above")
        async with AsyncClient(fleet.gateway.address) as client:
            for package, language in ALONE:
                await _alone(client, package, language, max_tokens)
            await _together(client, *TOGETHER, max_tokens)
    except TimeoutError:
        raise Unavailable(f"the workers did not start within {START_SECONDS:.0f} s") from None
    finally:
        with errors.status("shutting down"):
            await fleet.stop()


async def _alone(client: AsyncClient, package: str, language: str, max_tokens: int) -> None:
    # So small a model repeats itself when it always takes the likeliest token.
    whole = await _answer(
        client, package, language, max_tokens=max_tokens, temperature=0.0, repetition_penalty=1.1
    )
    rate = whole.usage.completion_tokens / max(whole.timings.total, 1e-9)
    console.print(f"[dim]{whole.worker}: {whole.usage.completion_tokens} tokens, {rate:.0f}/s[/]")


async def _together(client: AsyncClient, package: str, language: str, max_tokens: int) -> None:
    whole = await _answer(
        client,
        package,
        language,
        max_tokens=max_tokens,
        temperature=0.0,
        frequency_penalty=0.2,
        ensemble=ENSEMBLE,
    )
    report = whole.ensemble
    assert report is not None
    console.print(f"[dim]{report.strategy} of {report.width}, agreement {report.agreement:.0%}[/]")
    console.print(member_table(report))


async def _answer(
    client: AsyncClient, package: str, language: str, **options: Unpack[Options]
) -> Completion:
    """Stream one answer to the terminal."""
    how = " together" if "ensemble" in options else ""
    console.print(f"\n[bold]{package}[/] [dim]{language}{how}[/]")
    stream = client.stream(f"Package: {package}\nLanguage: {language}\n\n", **options)
    async for delta in stream:
        console.out(delta.text, end="", highlight=False)
    console.print()
    return stream.completion
