"""`conclave evaluate MODEL --original ORIGINAL --text FILE`: is the compressed one still good?"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from ...loading import device_of
from ...text.tokenizer import Tokenizer
from ..calibration import read_texts
from ..console import errors_told, progress, stderr
from ..reader import is_compressed
from .evaluation import Summary, score, summarize
from .reading import as_documents, evenly, load_unpacked
from .report import FILES, Stored, as_json, as_markdown, draw, report_folder, stored_weights


def evaluate(
    model: Annotated[Path, typer.Argument(help="compressed checkpoint")],
    original: Annotated[Path, typer.Option(help="the checkpoint that it was made of")],
    text: Annotated[Path, typer.Option(help="held-out text: .jsonl with `text`, or plain")],
    documents: Annotated[int | None, typer.Option(min=1, help="so many, evenly taken")] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens of a document that are read")] = 1024,
    out: Annotated[Path | None, typer.Option(help="folder for the report and pictures")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
) -> None:
    """Perplexity, divergence and agreement against the original, by language."""
    with errors_told():
        where = device_of(device)
        if out is not None:
            report_folder(out, FILES)
        chosen = evenly(read_texts(text), documents)
        sample = as_documents(chosen, Tokenizer(original), length)
        pair = load_unpacked(original, where), load_unpacked(model, where)
        with progress("reading") as told:
            scores = score(*pair, sample, told)
        about = {"model": str(model), "original": str(original), "text": str(text)}
        parts = (summarize(scores), stored_weights(model) if is_compressed(model) else [])
        report = as_json(about, *parts)
        if out is not None:
            (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            (out / "report.md").write_text(as_markdown(about, *parts))
            _draw(parts, out)
    if json_output:
        json.dump(report, sys.stdout)
    else:
        Console().print(Markdown(as_markdown(about, *parts)))


def _draw(parts: tuple[list[Summary], list[Stored]], folder: Path) -> None:
    try:
        draw(*parts, folder)
    except ImportError:
        stderr.print("no pictures: they need matplotlib (pip install matplotlib)")
