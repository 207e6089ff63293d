"""How fast are the linears of Gemma 4, against cuBLAS and others, on this machine's GPU?

Shapes of all models, from one token to thousands; then a whole layer's linears as one graph. Each
time is the median over replays of a CUDA graph, in which each launch reads another copy of the
weight, so that none comes from the L2 cache. A kernel whose answer is off by more than its rounding
gets no time but the error. Run it as `python -m benchmarks.kernels` on a machine with one NVIDIA
card; gemlite and torchao take part if they are installed.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .clock import copy_rate, matmul_rate
from .contestants import CUBLAS, DENSE4, GEMLITE, SPARSE
from .kinds import EVERYWHERE, HEADLINE_ONLY, warm
from .measurements import block_rows, rows_of, stack_rows
from .records import HEADLINE as HEADLINE_FILE
from .records import RESULTS, machine, write_headline, write_result
from .rows import Row, add_ratios, draw, find, pivot, ratio
from .shapes import HEADLINE, LINEARS, STACKS, Shape, tokens_of

console = Console(stderr=True)
QUICK = (1, 8, 64)
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
    parser.add_argument("--draw", action="store_true", help="only draw the last result")
    options = parser.parse_args()
    if options.draw:
        picture()
        return
    if not torch.cuda.is_available():
        raise SystemExit("no GPU; this measures kernels on one")
    torch.manual_seed(0)
    figures = measure(options)
    if not options.dry:
        save(figures, options.out)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    with console.status("compiling"):
        warm(HEADLINE, batches(HEADLINE, options), peers=not options.quick)
    copy, matmul = copy_rate(), matmul_rate()
    rate = copy.median
    print(f"{machine()}: copy {rate:.0f} GB/s, bf16 matmul {matmul.median:.0f} TFLOP/s")
    rows = [row for shape in chosen(LINEARS, options) for row in linear_rows(shape, rate, options)]
    for shape in chosen(STACKS, options):
        rows += told(stack_rows(shape, batches(shape, options), rate))
    blocks = [] if options.quick or options.shapes else told(block_rows(rate))
    return {
        "copy_gb_per_s": copy._asdict(),
        "matmul_tflops": matmul._asdict(),
        "times_cublas": pivot(rows),
        "blocks": blocks,
        "rows": rows,
    }


def linear_rows(shape: Shape, rate: float, options: argparse.Namespace) -> list[Row]:
    """All kinds at one shape."""
    wide = options.all or (shape == HEADLINE and not options.quick)
    weight = torch.randn(shape.rows, shape.columns, dtype=torch.bfloat16, device="cuda")
    found = (
        row
        for kind, build in (EVERYWHERE | HEADLINE_ONLY if wide else EVERYWHERE).items()
        for row in rows_of(kind, build, weight, str(shape), batches(shape, options), rate)
    )
    return told(found)


def batches(shape: Shape, options: argparse.Namespace) -> tuple[int, ...]:
    """Numbers of tokens."""
    return tuple(options.tokens or (QUICK if options.quick else tokens_of(shape)))


def chosen(shapes: tuple[Shape, ...], options: argparse.Namespace) -> list[Shape]:
    """Those that the options name by model or by size."""
    if options.quick:
        return [shape for shape in shapes if shape == HEADLINE]
    names = options.shapes
    return [shape for shape in shapes if not names or shape.model in names or str(shape) in names]


def told(found: Iterator[Row]) -> list[Row]:
    """Each row printed as it comes, with its ratio: cuBLAS comes first."""
    rows: list[Row] = []
    for row in found:
        rows.append(row)
        add_ratios(rows)
        line = f"{row['shape']:14} {row['tokens']:5d} {row['kind']:15}"
        if row["us"]:
            line += f" {row['us']:9.1f} us {row['vs_cublas'] or math.nan:6.2f}x"
            line += "".join(
                f"  {name} {row[name]:.3g}"
                for name in ("gb_per_s", "of_copy", "error", "limit_us", "of_limit")
                if name in row
            )
        print(line, row["note"], flush=True)
    return rows


def save(figures: dict[str, Any], out: Path | None) -> None:
    """Write the result, the headline figures that this script owns, and the picture."""
    rows, rate, shape = figures["rows"], figures["copy_gb_per_s"]["median"], str(HEADLINE)
    written = [write_result("kernels", figures), HEADLINE_FILE]
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


def picture() -> None:
    """Draw the last result, which may have been measured on another machine."""
    record = json.loads((RESULTS / "kernels.json").read_text())
    shape, path = str(HEADLINE), RESULTS / "kernels.png"
    draw(record["figures"]["rows"], shape, f"{shape}, {record['device']}", path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
