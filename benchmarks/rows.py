"""The rows of `benchmarks.kernels`: measured, refused or absent; their ratios and their picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .clock import Time
from .contestants import CUBLAS

Row = dict[str, Any]


def measured(kind: str, shape: str, tokens: int, time: Time, nbytes: int, rate: float) -> Row:
    """A row of a right answer; `rate` is the GB/s of a copy on the card."""
    own = nbytes / time.median / 1e3
    return {
        **_empty(kind, shape, tokens),
        "us": time.median,
        "low": time.low,
        "high": time.high,
        "gb_per_s": own,
        "of_copy": own / rate,
    }


def refused(kind: str, shape: str, tokens: int, why: str) -> Row:
    """A row without a time: a wrong answer, an error, a missing package."""
    return {**_empty(kind, shape, tokens), "note": why}


def _empty(kind: str, shape: str, tokens: int) -> Row:
    return {
        "kind": kind,
        "shape": shape,
        "tokens": tokens,
        **dict.fromkeys(("us", "low", "high", "vs_cublas", "gb_per_s", "of_copy", "error")),
        "note": "",
    }


def fastest(rows: Iterable[Row]) -> Row:
    """Of several ways to do the same: the fastest, or the last refusal if there is no time."""
    *_, last = rows = list(rows)
    return min((row for row in rows if row["us"]), key=lambda row: float(row["us"]), default=last)


def add_ratios(rows: Sequence[Row]) -> None:
    """Fills `vs_cublas`: how many times faster than bfloat16 by the vendor's library."""
    vendor = {(row["shape"], row["tokens"]): row["us"] for row in rows if row["kind"] == CUBLAS}
    for row in rows:
        base = vendor.get((row["shape"], row["tokens"]))
        if base and row["us"]:
            row["vs_cublas"] = base / row["us"]


def find(rows: Iterable[Row], kind: str, shape: str, tokens: int) -> Row | None:
    """The row with a time, if there is one."""
    for row in rows:
        if row["us"] and (row["kind"], row["shape"], row["tokens"]) == (kind, shape, tokens):
            return row
    return None


def ratio(base: Row, row: Row) -> tuple[float, tuple[float, float]]:
    """How many times faster `row` is than `base`, with the lowest and highest by their spreads."""
    return base["us"] / row["us"], (base["low"] / row["high"], base["high"] / row["low"])


def pivot(rows: Sequence[Row]) -> list[Row]:
    """A line for each shape and kind with its ratios to cuBLAS by tokens; "" where not measured."""
    tokens = sorted({row["tokens"] for row in rows})
    lines: dict[tuple[str, str], Row] = {}
    for row in rows:
        line = lines.setdefault(
            (row["shape"], row["kind"]),
            {"shape": row["shape"], "kind": row["kind"], **dict.fromkeys(map(str, tokens), "")},
        )
        line[str(row["tokens"])] = row["vs_cublas"] or row["note"]
    return list(lines.values())


def draw(rows: Sequence[Row], shape: str, title: str, path: Path) -> None:
    """The ratio to cuBLAS over the batch size, a line for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    own = [row for row in rows if row["shape"] == shape and row["vs_cublas"]]
    for kind in dict.fromkeys(row["kind"] for row in own):
        line = [(row["tokens"], row["vs_cublas"]) for row in own if row["kind"] == kind]
        axes.plot(*zip(*line, strict=True), marker="o", label=kind)
    ticks = sorted({row["tokens"] for row in own})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times cuBLAS bf16", title=title)
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_yticks(scale := (0.25, 0.5, 1, 2, 3, 4, 5, 6), labels=map(str, scale))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
