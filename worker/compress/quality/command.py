"""`conclave evaluate MODEL --original ORIGINAL --text FILE`: is the compressed one still good?"""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from ...errors import ConfigError
from ...loading import device_of
from ...model.config import ModelConfig
from ...model.decoder import Decoder
from ...text.tokenizer import Tokenizer
from ...weights import load_decoder
from ..calibration import read_texts
from ..console import errors_told, progress, stderr
from ..reader import is_compressed, load_compressed
from .evaluation import Document, Summary, score, summarize
from .report import Stored, as_json, as_markdown, draw, stored_weights


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
        sample = _documents(text, Tokenizer(original), documents, length)
        pair = _load(original, where), _load(model, where)
        with progress("reading") as told:
            scores = score(*pair, sample, told)
        about = {"model": str(model), "original": str(original), "text": str(text)}
        parts = (summarize(scores), stored_weights(model) if is_compressed(model) else [])
        report = as_json(about, *parts)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            (out / "report.md").write_text(as_markdown(about, *parts))
            _draw(parts, out)
    if json_output:
        json.dump(report, sys.stdout)
    else:
        Console().print(Markdown(as_markdown(about, *parts)))


def _documents(path: Path, tokenizer: Tokenizer, count: int | None, length: int) -> list[Document]:
    """Documents as token ids; those with nothing to predict are left out."""
    texts = read_texts(path)
    step = max(1, len(texts) // (count or len(texts)))
    found = []
    for text in texts[::step][: count or len(texts)]:
        prompt = tokenizer.encode(text.prompt) if text.prompt else []
        ids = prompt + tokenizer.encode(text.text, special=not prompt)
        start = max(1, len(prompt))
        if len(ids[:length]) > start:
            found.append(Document(text.language, tuple(ids[:length]), start))
    if not found:
        raise ConfigError(f"{path} has no document with a token to predict in its first {length}")
    return found


def _load(folder: Path, device: torch.device) -> Decoder:
    config = ModelConfig.load(folder)
    if is_compressed(folder):
        return load_compressed(folder, config, device, torch.float32, packed=False)
    return load_decoder(folder, config, device, torch.float32)


def _draw(parts: tuple[list[Summary], list[Stored]], folder: Path) -> None:
    try:
        draw(*parts, folder)
    except ImportError:
        stderr.print("no pictures: they need matplotlib (pip install matplotlib)")
