"""`conclave plan MODEL --memory-budget 16`: what streaming would bring; nothing is loaded."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import ValidationError
from rich.console import Console

from ..compress.console import errors_told, stderr
from ..compress.reader import is_compressed
from ..config import EngineConfig
from ..errors import ConfigError
from ..loading import check_knobs, formats_of, formats_on_loading, weight_format
from ..model.config import ModelConfig
from ..model.storage import Storage, storage_of
from ..narrow import expected_token_bytes
from ..weights import blank_decoder
from .device import LIBRARY, memory_of
from .forecast import H100, Rates, balance, computing, decoding, forecast
from .measured import measured_rates
from .pictures import PICTURES, draw
from .plan import plan_memory
from .report import Outlook, as_json, tables
from .shapes import NAMES, shape_of
from .timeline import chrome_trace, play

STEPS = (1, 8, 32, 512, 2048)
_MOST_TOKENS = 1 << 20
_LEAST_RATE, _MOST_RATE = 1e-3, 1e6
_RATES = {
    "link": ("--link", "GB/s", 1e9),
    "memory": ("--memory-rate", "GB/s", 1e9),
    "compute": ("--compute-rate", "TFLOP/s", 1e12),
}
"""By the name in `Rates`: the option that gives it, and its unit."""
_DTYPE = torch.bfloat16


def plan(
    memory_budget: Annotated[str, typer.Option(help='GiB, or a share of the GPU such as "60%"')],
    model: Annotated[Path | None, typer.Argument(help="checkpoint; config.json will do")] = None,
    shape: Annotated[str | None, typer.Option(help=f"instead: {', '.join(NAMES)}")] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=_MOST_TOKENS,
            help="of a step; repeatable",
            show_default=", ".join(map(str, STEPS)),
        ),
    ] = None,
    prefetch: Annotated[
        int | None, typer.Option(min=0, max=8, help="layers ahead", show_default="2")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="as the knob")] = None,
    weight_bits: Annotated[int | None, typer.Option(help="as the knob")] = None,
    max_error: Annotated[float | None, typer.Option(help="as the knob")] = None,
    max_context: Annotated[int | None, typer.Option(help="as the engine's")] = None,
    max_sequences: Annotated[int, typer.Option(help="as the engine's")] = 64,
    max_step_tokens: Annotated[int, typer.Option(help="as the engine's")] = 512,
    stream_experts: Annotated[
        bool, typer.Option(help="as the engine's: slots for single experts, by an assumed hit rate")
    ] = True,
    stream_coded: Annotated[
        bool, typer.Option(help="as the engine's: layers in a shorter code if that is faster")
    ] = True,
    link: Annotated[float | None, typer.Option(help="GB/s from the host")] = None,
    memory_rate: Annotated[float | None, typer.Option(help="GB/s of weights read")] = None,
    compute_rate: Annotated[float | None, typer.Option(help="TFLOP/s of products")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    plot: Annotated[Path | None, typer.Option(help="file for a picture")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="file for the steps' timelines, a Chrome trace")
    ] = None,
) -> None:
    """Tell which layers would stay on a GPU, which are streamed, and how long steps would take."""
    knobs = {
        **{"memory_budget": memory_budget, "prefetch": prefetch, "max_error": max_error},
        **{"sparsity": sparsity, "weight_bits": weight_bits},
    }
    limits = {
        **{"max_context": max_context, "max_sequences": max_sequences},
        **{"max_step_tokens": max_step_tokens, "stream_experts": stream_experts},
        **{"stream_coded": stream_coded},
    }
    with errors_told():
        if (model is None) == (shape is None):
            raise ConfigError("give a checkpoint or --shape, one of both")
        config = _config(model, {"knobs": knobs, **limits})
        given = _given({"link": link, "memory": memory_rate, "compute": compute_rate})
        outlook = _outlook(config, shape, sorted(set(tokens or STEPS)), given)
        if plot is not None:
            _draw(outlook, plot)
        if trace is not None:
            with _writing("--trace", trace):
                trace.write_text(json.dumps(chrome_trace(outlook.timelines), allow_nan=False))
    if json_output:
        print(json.dumps(as_json(outlook), allow_nan=False))
    else:
        for table in tables(outlook):
            Console().print(table)


def _config(model: Path | None, fields: dict[str, object]) -> EngineConfig:
    """As an engine would be set up; ConfigError with the option at fault."""
    try:
        return EngineConfig.model_validate({"model": model or Path(), **fields})
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][-1] if first["loc"] else "knobs").replace("_", "-")
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{option}: {message} (given: {first['input']})") from error


def _given(options: Mapping[str, float | None]) -> dict[str, float]:
    """The rates that were given, in their units; ConfigError with the option at fault."""
    for name, rate in options.items():
        option, unit, _ = _RATES[name]
        if rate is not None and not _LEAST_RATE <= rate <= _MOST_RATE:
            asked = f"{_LEAST_RATE:g} to {_MOST_RATE:g} {unit}"
            raise ConfigError(f"{option} is {rate:g}; give {asked}")
    return {name: rate for name, rate in options.items() if rate is not None}


def _outlook(
    config: EngineConfig, shape: str | None, steps: Sequence[int], given: Mapping[str, float]
) -> Outlook:
    model, storage = _sizes(config, shape)
    bytes_each = expected_token_bytes(model, config.knobs.max_error, _DTYPE.itemsize)
    sizes = _budget(config), _DTYPE.itemsize, bytes_each, LIBRARY
    found = plan_memory(config, model, storage, *sizes, graphs=config.cuda_graphs)
    rates, measured = _rates(given)
    times = tuple(
        forecast(model, storage, found.residency, found.ahead, each, rates, found.experts)
        for each in steps
    )
    own, decodes = found.residency, decoding(storage, found.residency, rates)
    timelines = {
        f"{each} tokens": play(
            *computing(model, storage, each, rates), own, rates.link, found.ahead > 0, decodes
        )
        for each in steps
    }
    even = balance(model, storage, found.residency, rates)
    return Outlook(found, rates, tuple(given), measured, times, even, timelines)


def _sizes(config: EngineConfig, name: str | None) -> tuple[ModelConfig, Storage]:
    """Of a checkpoint, or of a shape that has a name; as a GPU would store it."""
    format = weight_format(config)
    if name is not None:
        if name not in NAMES:
            raise ConfigError(f"--shape is {name!r}; choose one of {', '.join(NAMES)}")
        model = shape_of(name)
        blank = blank_decoder(model)
        return model, storage_of(blank, formats_on_loading(blank, format), _DTYPE, packed=True)
    model = ModelConfig.load(config.model)
    blank, compressed = blank_decoder(model), is_compressed(config.model)
    formats = formats_of(config.model, model, blank, None if compressed else format)
    storage = storage_of(blank, formats, _DTYPE, packed=True)
    if compressed:
        check_knobs(config, storage)
    return model, storage


def _budget(config: EngineConfig) -> int:
    if isinstance(config.knobs.memory_budget, str) and not torch.cuda.is_available():
        raise ConfigError("--memory-budget is a share of a GPU that is not here: give it in GiB")
    here = memory_of(torch.device("cuda")) if torch.cuda.is_available() else 0
    budget = config.knobs.budget(here)
    assert budget is not None
    return budget


def _rates(given: Mapping[str, float]) -> tuple[Rates, bool]:
    """Those that were given, the others measured if there is a GPU; and whether they were."""
    measured = torch.cuda.is_available() and len(given) < len(_RATES)
    rates = measured_rates(torch.device("cuda")) if measured else H100
    own = {name: rate * _RATES[name][-1] for name, rate in given.items()}
    return replace(rates, **own), measured


def _draw(outlook: Outlook, path: Path) -> None:
    kind = path.suffix.removeprefix(".") or PICTURES[0]
    if kind not in PICTURES:
        raise ConfigError(f"--plot draws no {kind!r}; name a file in {', '.join(PICTURES)}")
    try:
        with _writing("--plot", path):
            draw(outlook, path, kind)
    except ImportError:
        stderr.print("no picture: it needs matplotlib (pip install matplotlib)")


@contextmanager
def _writing(option: str, path: Path) -> Iterator[None]:
    """Around what writes the file that an option names; ConfigError if that cannot be."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{option} cannot write {path} ({error.strerror or error}); name a file in a folder "
            "that is there"
        ) from error
