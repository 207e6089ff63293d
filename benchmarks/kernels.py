"""How fast are the linears of Gemma 4, against cuBLAS and others, on this machine's GPU?

Shapes of all models, from one token to thousands; then a whole layer's linears as one graph. Each
time is the median over replays of a CUDA graph, in which each launch reads another copy of the
weight, so that none comes from the L2 cache. A kernel whose answer is off by more than its rounding
gets no time but the error. Run it as `python -m benchmarks.kernels` on a machine with one NVIDIA
card; gemlite and torchao take part if they are installed.
"""

import argparse
import gc
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from .blocks import Block, expert_block, expert_weights, sliding_block, sliding_layer
from .clock import Time, copy_rate, launches_over, matmul_rate, replayed
from .contestants import (
    CUBLAS,
    DENSE4,
    GEMLITE,
    SPARSE,
    Builder,
    Contestant,
    error_of,
)
from .experts import (
    LAUNCHES,
    Stack,
    bytes_read,
    choices,
    own_stack,
    random_stack,
    stack_error,
    vendor_stack,
)
from .kinds import EVERYWHERE, HEADLINE_ONLY, takes, warm
from .records import HEADLINE as HEADLINE_FILE
from .records import RESULTS, machine, write_headline, write_result
from .rows import Row, add_ratios, draw, fastest, find, measured, pivot, ratio, refused
from .shapes import EXPERTS_EACH, HEADLINE, LINEARS, STACKS, Shape, tokens_of

Timer = Callable[..., Time]
console = Console(stderr=True)

GOALS = (1, 8, 64, 256, 4096)
"""Batch sizes of the headline figures."""


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", help="models or RxK; all of Gemma 4 if left out")
    parser.add_argument("--tokens", nargs="+", type=int, help="batch sizes for every shape")
    parser.add_argument("--quick", action="store_true", help="the headline shape at 1, 8, 64 alone")
    parser.add_argument("--all", action="store_true", help="the other projects at every shape")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU; this measures kernels on one")
    torch.manual_seed(0)
    figures = measure(options)
    report(figures)
    if not options.dry:
        save(figures, options.out)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    with console.status("compiling"):
        warm(HEADLINE, options.tokens or tokens_of(HEADLINE), peers=not options.quick)
    copy, matmul = copy_rate(), matmul_rate()
    rows: list[Row] = []
    linears, stacks = (chosen_shapes(some, options) for some in (LINEARS, STACKS))
    for shape in track(linears, "linears", console=console):
        tokens = options.tokens or ((1, 8, 64) if options.quick else tokens_of(shape))
        wide = options.all or (shape == HEADLINE and not options.quick)
        weight = torch.randn(shape.rows, shape.columns, dtype=torch.bfloat16, device="cuda")
        for kind, build in (EVERYWHERE | HEADLINE_ONLY if wide else EVERYWHERE).items():
            rows += rows_of(kind, build, weight, str(shape), tokens, copy.median)
    for shape in track(stacks, "experts", console=console):
        for tokens in options.tokens or tokens_of(shape):
            rows += stack_rows(shape, tokens, copy.median)
    add_ratios(rows)
    blocks = [] if options.quick or options.shapes else block_rows(copy.median)
    return {
        "copy_gb_per_s": copy._asdict(),
        "matmul_tflops": matmul._asdict(),
        "times_cublas": pivot(rows),
        "blocks": blocks,
        "rows": rows,
    }


def chosen_shapes(shapes: tuple[Shape, ...], options: argparse.Namespace) -> list[Shape]:
    """Those that the options name by model or by size."""
    if options.quick:
        return [shape for shape in shapes if shape == HEADLINE]
    names = options.shapes
    return [shape for shape in shapes if not names or shape.model in names or str(shape) in names]


def rows_of(
    kind: str,
    build: Builder,
    weight: torch.Tensor,
    shape: str,
    tokens: Iterable[int],
    rate: float,
    timer: Timer = replayed,
) -> list[Row]:
    """What one kind does with one weight, at each number of tokens that it takes."""
    try:
        ways = list(build(weight))
    except ImportError:
        return [refused(kind, shape, count, "absent") for count in tokens]
    except Exception as error:
        return [refused(kind, shape, count, _message(error)) for count in tokens]
    rows = []
    for count in tokens:
        fitting = [way for way in ways if takes(way, count)]
        if fitting:
            rows.append(fastest([row_of(way, shape, count, rate, timer) for way in fitting]))
    del ways
    release()
    return rows


def row_of(way: Contestant, shape: str, tokens: int, rate: float, timer: Timer) -> Row:
    """Check one way to multiply, then time it."""
    try:
        error = error_of(way, tokens)
        if not error <= way.most_error:
            return refused(way.kind, shape, tokens, f"wrong: relative error {error:.2g}")
        x = way.activations(tokens)
        launches = launches_over(way.copies, 12 if tokens <= 64 else 6)
        time = timer(lambda index: way.multiply(x, index % way.copies), launches)
    except Exception as fault:
        return refused(way.kind, shape, tokens, _message(fault))
    row = measured(way.kind, shape, tokens, time, way.nbytes, rate)
    return {**row, "error": error, "note": way.way}


def stack_rows(shape: Shape, tokens: int, rate: float) -> list[Row]:
    """Experts by our kernel and by torch's grouped matmul; `tokens` have eight rows each."""
    weight, chosen = random_stack(shape), choices(tokens, shape.experts)
    x = torch.randn(tokens * EXPERTS_EACH, shape.columns, dtype=weight.dtype, device="cuda")
    rows = []
    for kind, build in ((CUBLAS, vendor_stack), (SPARSE, own_stack)):
        try:
            stack: Stack = build(weight, chosen)
            error = stack_error(stack, x, chosen[0])
            if not error <= 3e-3:
                rows.append(refused(kind, str(shape), tokens, f"wrong: relative error {error:.2g}"))
                continue
            time = replayed(partial(stack.multiply, x), LAUNCHES)
        except Exception as fault:
            rows.append(refused(kind, str(shape), tokens, _message(fault)))
            continue
        row = measured(kind, str(shape), tokens, time, bytes_read(stack, chosen), rate)
        rows.append({**row, "error": error, "note": f"{EXPERTS_EACH} experts a token"})
        release()
    return rows


def block_rows(rate: float) -> list[Row]:
    """Whole layers, each as one graph."""
    rows = []
    for kind, build in track(EVERYWHERE.items(), "layers of 31B", console=console):
        layer = sliding_layer(build)
        for tokens in (1, 8, 64):
            rows.append(block_row("31B layer", kind, tokens, partial(sliding_block, layer), rate))
        del layer
        release()
    weights = expert_weights()
    for kind, builder in ((CUBLAS, vendor_stack), (SPARSE, own_stack)):
        for tokens in track((1, 8, 64), f"experts of 26B, {kind}", console=console):
            make = partial(expert_block, builder, weights)
            rows.append(block_row("26B experts", kind, tokens, make, rate))
            release()
    return rows


def block_row(name: str, kind: str, tokens: int, make: Callable[[int], Block], rate: float) -> Row:
    """One block, timed; `limit_us` is what reading its bytes takes at the rate of a copy."""
    row: Row = {"block": name, "kind": kind, "tokens": tokens}
    measures = ("us", "low", "high", "limit_us", "of_limit")
    try:
        block = make(tokens)
        time = replayed(block.launch, block.launches)
    except Exception as fault:
        return {**row, **dict.fromkeys(measures), "note": _message(fault)}
    limit = block.nbytes / rate / 1e3
    values = (*time, limit, limit / time.median)
    return {**row, **dict(zip(measures, values, strict=True)), "note": ""}


def release() -> None:
    """Give memory back before the next weights."""
    gc.collect()
    torch.cuda.empty_cache()


def _message(fault: Exception) -> str:
    first, *_ = str(fault).strip().splitlines() or [""]
    return f"{type(fault).__name__}: {first[:120]}"


def report(figures: dict[str, Any]) -> None:
    """Say the figures in a table."""
    copy, matmul = figures["copy_gb_per_s"]["median"], figures["matmul_tflops"]["median"]
    print(f"{machine()}: copy {copy:.0f} GB/s, bf16 matmul {matmul:.0f} TFLOP/s")
    for row in figures["rows"]:
        line = f"{row['shape']:16} {row['tokens']:5d} {row['kind']:15}"
        if row["us"] is None:
            print(f"{line} {row['note']}")
            continue
        print(
            f"{line} {row['us']:9.1f} us {row['vs_cublas'] or 0:5.2f}x {row['gb_per_s']:6.0f} GB/s "
            f"{row['of_copy']:5.2f} of copy, error {row['error']:.1e} {row['note']}"
        )
    for row in figures["blocks"]:
        line = f"{row['block']:16} {row['tokens']:5d} {row['kind']:15}"
        time = f"{row['us']:9.1f} us, limit {row['limit_us']:.1f}" if row["us"] else row["note"]
        print(line, time)


def save(figures: dict[str, Any], out: Path | None) -> None:
    """Write the result, its picture and the headline figures that this script owns."""
    rows, rate, shape = figures["rows"], figures["copy_gb_per_s"]["median"], str(HEADLINE)
    written = [write_result("kernels", figures), RESULTS / "kernels.png", HEADLINE_FILE]
    draw(rows, shape, f"{shape}, {machine()}", written[1])
    for tokens in GOALS:
        base, own = (find(rows, kind, shape, tokens) for kind in (CUBLAS, SPARSE))
        if base and own:
            value, spread = ratio(base, own)
            write_headline(f"sparse_b{tokens}_vs_cublas", value, "ratio", spread)
    if one := find(rows, SPARSE, shape, 1):
        nbytes = one["gb_per_s"] * one["us"]
        spread = (nbytes / one["high"] / rate, nbytes / one["low"] / rate)
        write_headline("sparse_b1_copy_fraction", one["of_copy"], "fraction", spread)
    base, own = (find(rows, kind, shape, 1) for kind in (GEMLITE, DENSE4))
    if base and own:
        value, spread = ratio(base, own)
        write_headline("dense4_b1_vs_gemlite", value, "ratio", spread)
    for path in written:
        print(f"written: {path}")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out)


if __name__ == "__main__":
    main()
