"""What do products of integers gain at a prompt?

Six layers of the 31B shape (five sliding, one full), 5:16 int4 with random weights and whole
scales, run a prompt whole: norms, products, attention by our kernels, residuals. Once linears
multiply in bfloat16, once as integers, each row of activations within 1 %. How many rows need a
second digit is what decides: so linears are given drawn rows, of which so many fail with one
digit, either by outliers that keep to three channels or by twelve anywhere. "as it comes" gives
them what the layers before make, within 1 and 3 %; linears that a probe finds slower as integers
are then left in bfloat16, as an engine leaves them. Every linear is compared with the exact one.

Run it as `python -m benchmarks.prompts` on a Hopper card; `--dry` runs small shapes on a CPU.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conclave.kernels.attention.prefill import prefill
from conclave.kernels.formats import Format
from conclave.kernels.integer.digits import to_digits
from conclave.kernels.integer.multiply import on_hopper
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.integers import allow_integers, keep_the_faster
from conclave.worker.model.packed import MANY, PackedGate, PackedLinear

from .clock import Time, replayed
from .random_model import RandomModel
from .records import HEADLINE as HEADLINE_FILE
from .records import machine, write_headline, write_result
from .rows import Row

FORMAT = Format.parse("5:16-int4-g128")
LAYERS = 6
ERROR, LOOSE = 0.01, 0.03
ROUNDING = 4e-3
"""Of outputs in bfloat16, both ways."""
CHANNELS, ANYWHERE = "three channels", "anywhere"
CASES = ((0.0, ""), (0.01, CHANNELS), (0.2, CHANNELS), (0.01, ANYWHERE), (0.2, ANYWHERE))
HEADLINE_TOKENS = 2048
TOKENS = (1024, HEADLINE_TOKENS, 4096)
TINY = {
    **{"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1},
}
Linear = PackedLinear | PackedGate


class CausalAttention:
    """Of one whole sequence, by our kernels; keeps nothing."""

    def __init__(self, config: ModelConfig) -> None:
        self.windows = [layer.window for layer in config.layers]

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """See `Attention`."""
        assert key is not None and value is not None, "every layer of the 31B has keys of its own"
        out = torch.empty_like(query)
        keys, values = (each.transpose(0, 1).contiguous() for each in (key, value))
        prefill(query.contiguous(), keys, values, 0, self.windows[layer], out)
        return out


def main() -> None:
    """Compare, time, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="small shapes on a CPU; write nothing")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry else "cuda")
    if not (options.dry or (torch.cuda.is_available() and on_hopper(device))):
        raise SystemExit("no Hopper card; there products of integers run (or give --dry)")
    figures = measure(device, options.dry)
    if not options.dry:
        path = write_result("prompts", figures)
        print(f"written: {path}")
        if options.out is not None:
            for each in (path, HEADLINE_FILE):
                shutil.copy(each, options.out)


@torch.inference_mode()
def measure(device: torch.device, dry: bool) -> dict[str, Any]:
    """All figures."""
    settings = shape_settings("31b", LAYERS) | (TINY if dry else {})
    config = ModelConfig.parse(settings)
    print(f"{machine()}: {LAYERS} layers")
    decoder = RandomModel(config, FORMAT, device, whole=True).decoder()
    rows = []
    for tokens in (MANY,) if dry else TOKENS:
        for share, where in CASES if dry or tokens == HEADLINE_TOKENS else CASES[:1]:
            rows.append(drawn_row(decoder, tokens, share, where, device, dry))
            print(rows[-1], flush=True)
        for error in () if dry else (ERROR, LOOSE):
            rows.append(natural_row(decoder, tokens, error, device))
            print(rows[-1], flush=True)
    if not dry:
        own = [row for row in rows if row["tokens"] == HEADLINE_TOKENS]
        worst = min((row for row in own if row["where"] in ("", CHANNELS)), key=_gain)
        write_headline("int8_prefill_gain", worst["gain"], "ratio", (worst["low"], worst["high"]))
    what = f"{LAYERS} layers of the 31B shape, {FORMAT}, random weights; ms a layer"
    return {"what": what, "rows": rows}


def _gain(row: Row) -> float:
    return float(row["gain"])


def drawn_row(
    decoder: Decoder, tokens: int, share: float, where: str, device: torch.device, dry: bool
) -> Row:
    """Linears given rows of which `share` have outliers."""
    given = {
        width: drawn(tokens, width, share, where, device)
        for width in {linear.weight.columns for linear in linears(decoder)}
    }
    row: Row = {"tokens": tokens, "max_error": ERROR, "failing": share, "where": where}
    with replaced(decoder, given):
        allow(decoder, ERROR)
        compare(decoder, given)
        if dry:
            return row
        seconds = [to_digits(x, ERROR).marks[0, 1] / tokens for x in given.values()]
        row["failed"] = float(torch.stack(seconds).mean())
        row["integers"] = len(list(linears(decoder)))
        return row | gain(decoder, tokens, device)


def natural_row(decoder: Decoder, tokens: int, error: float, device: torch.device) -> Row:
    """Linears given what comes, those that are slower as integers in bfloat16."""
    allow(decoder, error)
    kept = keep_the_faster(decoder, device)
    row: Row = {"tokens": tokens, "max_error": error, "failing": "", "where": "as it comes"}
    return row | {"failed": "", "integers": kept} | gain(decoder, tokens, device)


def linears(decoder: Decoder) -> Iterator[Linear]:
    """Of all layers."""
    for module in decoder.layers.modules():
        if isinstance(module, Linear):
            yield module


def allow(decoder: Decoder, error: float) -> None:
    """All linears as integers."""
    found = sum(allow_integers(decoder, layer, error) for layer in range(LAYERS))
    assert found == len(list(linears(decoder))), "random weights have whole scales"


def drawn(tokens: int, width: int, share: float, where: str, device: torch.device) -> Tensor:
    """Rows that one digit holds within `ERROR`, but for a share of them."""
    draw = torch.Generator(device).manual_seed(width)
    x = torch.randn(tokens, width, generator=draw, device=device).clamp_(-3.9, 3.9)
    failing = torch.randperm(tokens, generator=draw, device=device)[: round(share * tokens)]
    if where == CHANNELS:
        x[failing[:, None], torch.tensor((3, width // 2, width - 1), device=device)] = 30.0
    elif where == ANYWHERE:
        size = (len(failing), 12)
        places = torch.randint(width, size, generator=draw, device=device)
        x[failing[:, None], places] = 12.0
    return x.bfloat16()


@contextmanager
def replaced(decoder: Decoder, given: dict[int, Tensor]) -> Iterator[None]:
    """Every linear is given rows of ours in place of what comes."""
    hooks = [
        linear.register_forward_pre_hook(lambda own, _: (given[own.weight.columns],))
        for linear in linears(decoder)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compare(decoder: Decoder, given: dict[int, Tensor]) -> None:
    """AssertionError if a linear of the first layer is further off than its activations may be."""
    for linear in decoder.layers[0].modules():
        if isinstance(linear, Linear):
            x = given[linear.weight.columns]
            found = linear(x).double()
            error, linear.error = linear.error, None
            exact = linear(x).double()
            linear.error = error
            off = float((found - exact).norm() / exact.norm())
            # A gate's slope is at most 1.13, and its value is multiplied by another that is off.
            allowed = ERROR * (2.2 if isinstance(linear, PackedGate) else 1.0) + ROUNDING
            assert off <= allowed, f"{linear.weight.shape} is {off:.4f} off"


def gain(decoder: Decoder, tokens: int, device: torch.device) -> Row:
    """Milliseconds a layer both ways; integers first, as they were allowed."""
    ids = torch.randint(512, (tokens,), device=device)
    positions = torch.arange(tokens, device=device)
    attention = CausalAttention(decoder.config)

    def run(_: int) -> Tensor:
        hidden: Tensor = decoder(ids, positions, attention)
        return hidden

    chosen = [(linear, linear.error) for linear in linears(decoder)]
    rounds: list[tuple[Time, Time]] = []
    for _ in range(3):  # in turn, as a card grows slower when it grows warm
        integers = replayed(run, launches=1, repeats=5, milliseconds=60)
        for linear, _error in chosen:
            linear.error = None
        exact = replayed(run, launches=1, repeats=5, milliseconds=60)
        for linear, error in chosen:
            linear.error = error
        rounds.append((integers, exact))
    gains = sorted(exact.median / integers.median for integers, exact in rounds)
    integers, exact = sorted(rounds, key=lambda each: each[1].median / each[0].median)[1]
    return {
        "integer_ms": integers.median / 1e3 / LAYERS,
        "bfloat16_ms": exact.median / 1e3 / LAYERS,
        "gain": gains[1],
        "low": gains[0],
        "high": gains[-1],
    }


if __name__ == "__main__":
    main()
