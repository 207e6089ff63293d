"""`conclave export` and `conclave import`: to and from checkpoints that others read."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from ...errors import ConclaveError, ConfigError
from .exporter import STYLES, Exported, Style, export_checkpoint
from .importer import Imported, import_checkpoint

_console = Console(stderr=True)


def export(
    source: Annotated[Path, typer.Argument(help="compressed checkpoint")],
    target: Annotated[Path, typer.Argument(help="new folder for the Hugging Face one")],
    format: Annotated[str, typer.Option(help=", ".join(STYLES))] = "pack-quantized",
    exact: Annotated[
        bool, typer.Option("--exact", help="plain values of integers in float32, not rounded")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="say what became of it as JSON")] = False,
) -> None:
    """Write a compressed checkpoint as one that stock Hugging Face loaders read."""
    with _errors_told(), _bar("exporting") as told:
        outcomes = export_checkpoint(source, target, _style(format), told, exact)
    plain = [each for each in outcomes if "plain" in each.written_as and "int" in each.format]
    if plain and format == "pack-quantized":
        _console.print(
            f"plain values are written of {len(plain)} weights of integers: stock loaders have no "
            "quantized form of experts, embeddings and heads"
            + ("" if exact else " (rounded to the checkpoint's dtype; --exact does not)")
        )
    _say(target, outcomes, as_json)


def import_(
    source: Annotated[Path, typer.Argument(help="pack-quantized Hugging Face checkpoint")],
    target: Annotated[Path, typer.Argument(help="folder for the compressed one")],
    maps: Annotated[
        Path | None,
        typer.Option(help="which weights survive; by default the source's sparsity.safetensors"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="say what became of it as JSON")] = False,
) -> None:
    """Take a quantized checkpoint over as a compressed one, no code or scale changed."""
    with _errors_told(), _bar("importing") as told:
        outcomes = import_checkpoint(source, target, maps, told)
    _say(target, outcomes, as_json)


def _style(text: str) -> Style:
    for style in STYLES:
        if style == text:
            return style
    raise ConfigError(f"--format is {text!r}; choose one of {', '.join(STYLES)}")


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except (ConclaveError, OSError) as error:
        _console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, files: bar.update(task, completed=done, total=files)


def _say(target: Path, outcomes: Sequence[Exported | Imported], as_json: bool) -> None:
    rows = [asdict(outcome) for outcome in outcomes]
    if as_json:
        json.dump({"target": str(target), "weights": rows}, sys.stdout)
        return
    table = Table(*(name.replace("_", " ") for name in rows[0])) if rows else Table()
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
