"""`conclave compress SRC DST`: a sparse, quantized checkpoint of a full one."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from ...kernels.errors import LayoutError
from ...kernels.formats import Format
from ..errors import ConfigError
from ..knobs import Knobs
from ..loading import device_of
from ..model.config import ModelConfig
from ..text.tokenizer import Tokenizer
from .calibration import check_ids, sequences
from .console import errors_told, progress, stderr
from .fingerprint import fingerprint
from .layerwise import compress_checkpoint, measure
from .manifest import MANIFEST, read_manifest
from .pruning import MODES, Mode
from .recipe import Outcome, Recipe, allotted
from .recovery.command import recover_from_text
from .recovery.schedule import Schedule
from .sources.adapter import Adapter
from .sources.like import Like

FORMAT, EMBEDDINGS = "5:16-int4-g64", "dense-int8-g64"


def compress(
    source: Annotated[Path, typer.Argument(help="checkpoint folder")],
    target: Annotated[Path, typer.Argument(help="folder for the compressed one")],
    text: Annotated[Path, typer.Option(help="calibration text: .jsonl with `text`, or plain")],
    format: Annotated[
        str | None, typer.Option(help="of every large weight", show_default=FORMAT)
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="on average; N of N:16 is then measured for each weight (reads twice)"),
    ] = None,
    experts_alike: Annotated[
        bool,
        typer.Option(help="then one N for all experts, so that engines can fetch single ones"),
    ] = True,
    weight_bits: Annotated[
        int | None,
        typer.Option(help="of a value: 4, 8 or 16, instead of --format; all are kept by default"),
    ] = None,
    mode: Annotated[str, typer.Option(help=", ".join(MODES))] = "sparsegpt",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=FORMAT, or PATTERN alone to leave a weight as it is; repeatable"
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(help="of embeddings and head, or plain", show_default=EMBEDDINGS),
    ] = None,
    whole_scales: Annotated[
        bool,
        typer.Option(
            "--whole-scales", help="of 4 bits: engines with prompt_error multiply as integers"
        ),
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(help="compressed checkpoint whose formats and surviving weights are taken"),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT LoRA adapter, merged into the checkpoint first")
    ] = None,
    recover: Annotated[
        int | None,
        typer.Option(min=1, help="steps of training on the same text; see `conclave recover`"),
    ] = None,
    count: Annotated[int, typer.Option("--sequences", min=1, help="of calibration")] = 128,
    length: Annotated[int, typer.Option(min=2, help="tokens of a sequence")] = 512,
    seed: Annotated[int, typer.Option(help="which documents are taken")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="say what became of it as JSON")] = False,
) -> None:
    """Compress a Gemma 4 checkpoint layer by layer; run it again to go on after an interruption."""
    with errors_told():
        way, knobs = _mode(mode), _knobs(sparsity, weight_bits)
        recipe = _recipe(format, knobs, way, dict(map(_exception, keep or [])))
        recipe = replace(recipe, embeddings=_embeddings(embeddings or EMBEDDINGS))
        options = ("--format", "--sparsity", "--weight-bits", "--keep", "--embeddings")
        given = (format, sparsity, weight_bits, keep, embeddings)
        taken = dict(zip(options, given, strict=True))
        pattern = None if like is None else _pattern(like, source, taken)
        if pattern is not None:
            recipe = pattern.recipe(way)
        recipe = _whole(recipe) if whole_scales else recipe
        tokens = sequences(text, Tokenizer(source), count, length, seed)
        check_ids(tokens, source)
        where = device_of(device)
        if recover is not None and adapter is not None:
            raise ConfigError(
                "--recover learns from a whole checkpoint: merge the adapter into one with PEFT's "
                "merge_and_unload, or leave --recover out"
            )
        tuned = None if adapter is None else Adapter(adapter, ModelConfig.load(source))
        if tuned is not None and tuned.unused:
            stderr.print(f"the adapter changes more than text: {len(tuned.unused)} tensors unused")
        about: dict[str, object] = {
            "source": fingerprint(source),
            "format": str(recipe.format or ""),
            "mode": mode,
            "keep": keep or [],
            "sparsity": sparsity,
            "experts_alike": experts_alike,
            "embeddings": str(recipe.embeddings or ""),
            "calibration": {
                **{"sequences": count, "length": length, "seed": seed},
                "sha256": sha256(tokens.numpy().tobytes()).hexdigest(),
            },
            "torch": version("torch"),
            **({"whole_scales": True} if whole_scales else {}),
        }
        pruned = target if recover is None else target.with_name(target.name + ".one-shot")
        like_print = None if pattern is None else pattern.fingerprint
        outcomes = [] if recover is None else _made(pruned, {**about, "like": like_print})
        if not outcomes and sparsity is not None and not (sparsity == 0 and _is_dense(recipe)):
            with progress("measuring") as told:
                found = measure(source, tokens, where, told, tuned)
                recipe = allotted(recipe, found, sparsity, experts_alike)
        if not outcomes:
            with progress("compressing") as told:
                outcomes = compress_checkpoint(
                    source, pruned, recipe, tokens, where, about, told, tuned, pattern
                )
        if recover is not None:
            schedule = Schedule(steps=recover, seed=seed)
            recover_from_text(pruned, target, source, text, None, length, schedule, where)
    if as_json:
        json.dump({"target": str(target), "weights": list(map(asdict, outcomes))}, sys.stdout)
        return
    table = Table("weight", "format", "output error", "inputs", "experts by weights alone")
    for each in outcomes:
        few = str(each.by_weights_alone or "")
        table.add_row(each.name, each.format, f"{each.error:.4f}", str(each.inputs), few)
    Console().print(table)


def _made(folder: Path, about: Mapping[str, object]) -> list[Outcome]:
    """What became of the weights of a finished checkpoint; none if it is not finished.

    Raises ConfigError if it is another than `about` tells.
    """
    if not (folder / MANIFEST).exists():
        return []
    made = read_manifest(folder / MANIFEST).about
    if any(made.get(name) != value for name, value in about.items()):
        raise ConfigError(f"{folder} was made with other settings: remove it, or name a new target")
    return [Outcome(**weight) for weight in made["weights"]]


def _knobs(sparsity: float | None, weight_bits: int | None) -> Knobs:
    try:
        return Knobs(sparsity=sparsity, weight_bits=weight_bits)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{option}: {message} (given: {first['input']})") from error


def _recipe(
    format: str | None, knobs: Knobs, mode: Mode, exceptions: dict[str, Format | None]
) -> Recipe:
    """What --format or --weight-bits say; which of 16 survive is found later, with --sparsity."""
    if knobs.weight_bits is None:
        return Recipe(_format(format or FORMAT), mode, exceptions)
    if format is not None:
        raise ConfigError("--format and --weight-bits both say how a weight is stored: give one")
    return Recipe.from_knobs(knobs, mode, exceptions)


def _whole(recipe: Recipe) -> Recipe:
    """The same with whole scales; ConfigError if it makes no weight of 4 bits."""
    formats = {recipe.format, *recipe.exceptions.values()}
    if not any(format is not None and format.bits == 4 for format in formats):
        raise ConfigError(
            "--whole-scales is for weights of 4 bits: give --format 5:16-int4-g64 or alike, or "
            "leave it out"
        )
    return replace(recipe, whole=True)


def _is_dense(recipe: Recipe) -> bool:
    return recipe.format is not None and recipe.format.dense


def _pattern(folder: Path, source: Path, options: Mapping[str, object]) -> Like:
    """What --like names; the options that it stands for must not be given."""
    if given := [name for name, value in options.items() if value is not None]:
        raise ConfigError(
            f"--like takes formats and maps from {folder}: leave {' and '.join(given)} out"
        )
    return Like(folder, ModelConfig.load(source))


def _format(text: str) -> Format:
    try:
        return Format.parse(text)
    except LayoutError as error:
        raise ConfigError(f"--format: {error}") from error


def _embeddings(text: str) -> Format | None:
    if text == "plain":
        return None
    try:
        format = Format.parse(text)
    except LayoutError as error:
        raise ConfigError(f"--embeddings: {error}; or plain") from error
    if not format.dense:
        raise ConfigError(f"--embeddings is {text}; choose a dense format, or plain")
    return format


def _mode(text: str) -> Mode:
    for mode in MODES:
        if mode == text:
            return mode
    raise ConfigError(f"--mode is {text!r}; choose one of {', '.join(MODES)}")


def _exception(text: str) -> tuple[str, Format | None]:
    pattern, _, format = text.partition("=")
    return pattern, _format(format) if format else None
