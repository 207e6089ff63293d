"""`conclave audit MODEL --text FILE`: are keys and values as near as `max_error` says?"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table as Shown

from ..compress.calibration import read_texts
from ..compress.console import errors_told, progress, stderr
from ..compress.quality.reading import as_documents, evenly, load_unpacked
from ..compress.quality.report import report_folder
from ..errors import ConfigError
from ..knobs import LEAST_ERROR, MOST_ERROR
from ..loading import device_of
from ..text.tokenizer import Tokenizer
from .findings import Finding
from .pictures import draw
from .reading import audit as read
from .report import as_json, as_markdown, details, overview

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def audit(
    model: Annotated[Path, typer.Argument(help="checkpoint, plain or compressed")],
    text: Annotated[Path, typer.Option(help="text: .jsonl with `text`, or plain")],
    max_error: Annotated[
        list[float] | None,
        typer.Option(help="allowed, relative to a key or value; repeatable", show_default="0.01"),
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="so many, evenly taken")] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens of a document that are read")] = 1024,
    out: Annotated[Path | None, typer.Option(help="folder for the report and pictures")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"that the model runs in: {', '.join(DTYPES)}")] = (
        "float32"
    ),
    json_output: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """Recompute how far off keys and values in narrow numbers are; status 1 if one is too far."""
    with errors_told():
        limits = _limits(max_error or [0.01])
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
        where = device_of(device)
        if out is not None:
            pictures = (_picture(each) for each in limits)
            report_folder(out, ("audit.json", "audit.md", *pictures))
        sample = as_documents(evenly(read_texts(text), documents), Tokenizer(model), length)
        decoder = load_unpacked(model, where, DTYPES[dtype])
        with progress("reading") as told:
            found = read(decoder, sample, limits, told)
        about = {
            **{"model": str(model), "text": str(text), "device": str(where), "dtype": dtype},
            **{"documents": len(sample), "tokens": sum(len(each.ids) for each in sample)},
        }
        report = as_json(about, found)
        if out is not None:
            _write(report, as_markdown(about, found), found, out)
    if json_output:
        json.dump(report, sys.stdout)
    else:
        _show(found)
    if not all(each.held for each in found):
        raise typer.Exit(1)


def _limits(given: Sequence[float]) -> list[float]:
    for each in given:
        if not LEAST_ERROR <= each <= MOST_ERROR:
            raise ConfigError(f"--max-error is {each:g}; it must be {LEAST_ERROR} to {MOST_ERROR}")
    return list(dict.fromkeys(given))


def _write(report: Any, text: str, found: Sequence[Finding], folder: Path) -> None:
    (folder / "audit.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "audit.md").write_text(text)
    try:
        for each in found:
            draw(each, folder / _picture(each.max_error))
    except ImportError:
        stderr.print("no pictures: they need matplotlib (pip install matplotlib)")


def _picture(max_error: float) -> str:
    return f"errors-{max_error:g}.png"


def _show(found: Sequence[Finding]) -> None:
    """Details only of a single error allowed: of several they would fill screens."""
    console = Console()
    only = details(found[0]) if len(found) == 1 else ()
    for table in (overview(found), *only):
        shown = Shown(title=table.title, box=box.SIMPLE_HEAD, title_justify="left")
        shown.padding, shown.collapse_padding, shown.pad_edge = (0, 1), True, False
        for head in table.heads:
            shown.add_column(head, no_wrap=True)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
