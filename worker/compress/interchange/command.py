"""`conclave export` and `conclave import`: to and from checkpoints that others read."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...errors import ConfigError
from ..console import errors_told, progress, stderr
from .exporter import STYLES, Exported, Style, export_checkpoint
from .importer import Imported, import_checkpoint


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
    with errors_told(), progress("exporting") as told:
        outcomes = export_checkpoint(source, target, _style(format), told, exact)
    plain = [each for each in outcomes if "plain" in each.written_as and "int" in each.format]
    if plain and format == "pack-quantized":
        stderr.print(
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
    with errors_told(), progress("importing") as told:
        outcomes = import_checkpoint(source, target, maps, told)
    _say(target, outcomes, as_json)


def _style(text: str) -> Style:
    for style in STYLES:
        if style == text:
            return style
    raise ConfigError(f"--format is {text!r}; choose one of {', '.join(STYLES)}")


def _say(target: Path, outcomes: Sequence[Exported | Imported], as_json: bool) -> None:
    rows = [asdict(outcome) for outcome in outcomes]
    if as_json:
        json.dump({"target": str(target), "weights": rows}, sys.stdout)
        return
    table = Table(*(name.replace("_", " ") for name in rows[0])) if rows else Table()
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
