"""`conclave recover COMPRESSED DST --original MODEL --text FILE`: training for what was pruned."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ...loading import device_of
from ...text.tokenizer import Tokenizer
from ..calibration import all_sequences, check_ids
from ..console import errors_told, progress
from .recover import recover_checkpoint
from .schedule import Schedule
from .synthetic import write_text
from .training import Look

_DEFAULT = Schedule()


def recover(
    compressed: Annotated[Path, typer.Argument(help="what `conclave compress` has made")],
    target: Annotated[Path, typer.Argument(help="folder for the recovered one")],
    original: Annotated[Path, typer.Option(help="the checkpoint that it was made of")],
    text: Annotated[Path, typer.Option(help="training text: .jsonl with `text`, or plain")],
    held_out: Annotated[
        Path | None, typer.Option(help="text to judge it by; else 1/50 of the other")
    ] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(help="one more full checkpoint to learn from; may be given several times"),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens of a sequence")] = 512,
    steps: Annotated[int, typer.Option(help="of the optimizer")] = _DEFAULT.steps,
    sequences: Annotated[int, typer.Option(help="in a step")] = _DEFAULT.sequences,
    at_once: Annotated[int, typer.Option(help="of them on the device")] = _DEFAULT.at_once,
    learning_rate: Annotated[float, typer.Option(help="the highest")] = _DEFAULT.learning_rate,
    text_share: Annotated[
        float, typer.Option(help="of the loss that is the text, not the original's opinion of it")
    ] = _DEFAULT.text_share,
    weight_decay: Annotated[
        float, typer.Option(help="of all matrices; the original's own is a good start")
    ] = _DEFAULT.weight_decay,
    gradual: Annotated[
        float, typer.Option(help="share of the steps over which sparsity rises from none")
    ] = _DEFAULT.gradual,
    remap: Annotated[
        float, typer.Option(help="share of the run in which the maps are learned, too")
    ] = _DEFAULT.remap,
    synthetic: Annotated[
        int, typer.Option(min=0, help="sequences that the teachers write, beside the text")
    ] = 0,
    minutes: Annotated[
        float, typer.Option(min=0, help="end training by then, with fewer steps if need be")
    ] = math.inf,
    looks: Annotated[int, typer.Option(help="at the held-out text")] = _DEFAULT.looks,
    patience: Annotated[
        int, typer.Option(help="looks without a better one before it ends")
    ] = _DEFAULT.patience,
    seed: Annotated[int, typer.Option(help="of the order of sequences")] = _DEFAULT.seed,
    optimizer: Annotated[
        str, typer.Option(help="adamw, or muon for the layers' packed matrices")
    ] = _DEFAULT.optimizer,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="the looks as JSON")] = False,
) -> None:
    """Train what a compressed checkpoint keeps; run it again to go on after an interruption."""
    until = time.monotonic() + 60 * minutes
    with errors_told():
        schedule = Schedule(
            *(steps, sequences, at_once, learning_rate, text_share, weight_decay, gradual, remap),
            *(looks, patience, seed, optimizer),
        )
        source = compressed, target, original, text, held_out
        where, others = device_of(device), teacher or ()
        found = recover_from_text(*source, length, schedule, where, others, synthetic, until)
    if as_json:
        json.dump({"target": str(target), "looks": list(map(asdict, found))}, sys.stdout)
        return
    table = Table("step", "KL, training", "KL, held out", "loss, held out")
    for look in found:
        numbers = (look.training_divergence, look.divergence, look.loss)
        table.add_row(str(look.step), *(f"{number:.4f}" for number in numbers))
    Console().print(table)


def recover_from_text(
    compressed: Path,
    target: Path,
    original: Path,
    text: Path,
    held_out: Path | None,
    length: int,
    schedule: Schedule,
    device: torch.device,
    teachers: Sequence[Path] = (),
    synthetic: int = 0,
    until: float = math.inf,
) -> list[Look]:
    """As `recover_checkpoint`, on the text of a file; without `held_out` 1/50 of it is set aside.

    `synthetic` sequences that the original and `teachers` write are added. Shows how far it is.
    Raises ConfigError for text that cannot be read, is too short, or has ids that a model lacks.
    """
    tokenizer = Tokenizer(original)
    tokens = all_sequences(text, tokenizer, length, schedule.seed)
    check_ids(tokens, original, *teachers)
    if held_out is None:
        aside = math.ceil(len(tokens) / 50)
        tokens, judged = tokens[aside:], tokens[:aside]
    else:
        judged = all_sequences(held_out, tokenizer, length, schedule.seed)
        check_ids(judged, original, *teachers)
    if synthetic:
        with progress("writing text") as told:
            folders = original, *teachers
            written = write_text(folders, tokens, synthetic, schedule.seed, device, told)
        tokens = torch.cat((tokens, written))
    with progress("recovering") as told:

        def step_told(step: int, done: float, look: Look | None) -> None:
            name = None if look is None else f"recovering, KL {look.divergence:.4f}"
            told(step, round(step / done), name)

        return recover_checkpoint(
            *(compressed, original, target, tokens, judged, schedule, device),
            *(step_told, teachers, until, synthetic),
        )
