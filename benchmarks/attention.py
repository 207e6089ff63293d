"""How fast is attention over a cache, against copying its bytes and against torch?

Decoding: one query a sequence, layers of the 31B and the 26B model, up to 128k tokens of context,
over bfloat16 pages and pages in 8 bits, beside the fastest of torch's attention in bfloat16. A
sliding layer reads its window whatever the context. `of_copy` is own bytes a second (codes, scales
and indices) over what a copy of the device moves, `vs_torch` how many times as fast as the best of
torch. Prompts: products of a chunk alone over the rate of a matmul. Writing: new keys and values of
a decoding step into bfloat16 pages. Times are medians over replays of a CUDA graph, each launch
with other keys and values, or other places for them, so that none come from the L2 cache. Who
answers wrong gets no time but the error. FlexAttention is compiled for every shape, for seconds, so
it takes part at one of them.
"""

import argparse
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conclave.kernels.attention.ops import write

from .attenders import (
    PAGE,
    Layer,
    Way,
    flex_decode,
    own_int8,
    own_plain,
    own_prefill,
    pairs_seen,
    torch_decode,
    torch_prefill,
)
from .clock import Time, copies_past_cache, copy_rate, launches_over, matmul_rate, replayed
from .contestants import relative_error
from .measurements import Timer, release, told
from .records import HEADLINE as HEADLINE_FILE
from .records import machine, write_headline, write_result
from .rows import Row, fastest, ratio

FULL = Layer("31B full", 32, 4, 512, None, 64)
SLIDING = Layer("31B sliding", 32, 16, 256, 1024)
DECODING = (
    *(FULL, SLIDING),
    *(Layer("26B full", 16, 2, 512, None, 64), Layer("26B sliding", 16, 8, 256, 1024)),
)
PROMPTS = (FULL, Layer("256 wide, no window", 32, 16, 256), SLIDING)
CONTEXTS = (8192, 32768, 131072)
OWN, PLAIN, INT8 = "prefill", "bfloat16 pages", "int8 pages"
SDPA, FLEX = "SDPA bfloat16", "FlexAttention bfloat16"
WRITE, INDEX_COPY = "write", "index_copy_ twice"
BATCHES = (1, 8, 32)
TOKENS = (2048, 8192)
WRITING = [(layer, tokens) for layer in (SLIDING, FULL) for tokens in BATCHES]
"""Layers and new tokens."""
HEADLINE = (FULL, 32768, 8)
"""Layer, context and batch of the headline figures."""
Builder = Callable[[], Iterator[Way]]
Writer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the headline shape and one prompt")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU; this measures kernels on one")
    warnings.filterwarnings("ignore", module="torch")  # why a backend does not take part
    torch.manual_seed(0)
    figures = measure(options.quick)
    if not options.dry:
        save(figures, options.out)


def measure(quick: bool) -> dict[str, Any]:
    """All figures."""
    copy, matmul = copy_rate(), matmul_rate()
    print(f"{machine()}: copy {copy.median:.0f} GB/s, bf16 matmul {matmul.median:.0f} TFLOP/s")
    shapes = [HEADLINE] if quick else list(decoding_shapes())
    prompts = [(FULL, TOKENS[-1])] if quick else [(own, n) for own in PROMPTS for n in TOKENS]
    decode = [row for shape in shapes for row in decode_rows(*shape, copy.median)]
    return {
        "copy_gb_per_s": copy._asdict(),
        "matmul_tflops": matmul._asdict(),
        "decode": decode,
        "prefill": [row for prompt in prompts for row in prefill_rows(*prompt, matmul.median)],
        "write": [row for shape in WRITING for row in write_rows(*shape)],
    }


def decoding_shapes() -> Iterator[tuple[Layer, int, int]]:
    """Layers, contexts and batches."""
    for layer in DECODING:
        for context in CONTEXTS if layer.window is None else CONTEXTS[1:2]:
            yield from ((layer, context, batch) for batch in BATCHES)


def decode_rows(
    layer: Layer,
    context: int,
    batch: int,
    rate: float,
    timer: Timer = replayed,
    device: str = "cuda",
) -> list[Row]:
    """Every kind at one shape; `rate` is the GB/s of a copy."""
    kinds = {PLAIN: own_plain, INT8: own_int8, SDPA: torch_decode}
    if layer in (FULL, SLIDING) and (context, batch) == HEADLINE[1:]:
        kinds[FLEX] = flex_decode
    found = []
    for kind, make in kinds.items():
        row = best(kind, partial(make, layer, batch, context, device), timer)
        speed = row.pop("nbytes") / row["us"] / 1e3 if row["us"] else None
        row |= {"gb_per_s": speed, "of_copy": speed and speed / rate}
        found.append({"layer": layer.name, "context": context, "batch": batch, **row})
    return printed(found)


def prefill_rows(
    layer: Layer,
    tokens: int,
    rate: float,
    timer: Timer = replayed,
    device: str = "cuda",
) -> list[Row]:
    """Every kind for one prompt; `rate` is the TFLOP/s of a matmul."""
    work = 4 * pairs_seen(tokens, layer.window) * layer.head_dim * layer.heads
    found = []
    for kind, make in {OWN: own_prefill, SDPA: torch_prefill}.items():
        row = best(kind, partial(make, layer, tokens, device), timer)
        speed = work / row["us"] / 1e6 if row["us"] else None
        row |= {"tflops": speed, "of_matmul": speed and speed / rate}
        del row["nbytes"]
        found.append({"layer": layer.name, "tokens": tokens, **row})
    return printed(found)


def write_rows(
    layer: Layer, tokens: int, timer: Timer = replayed, device: str = "cuda"
) -> list[Row]:
    """New keys and values of so many sequences, by our kernel and by torch."""
    found: list[Row] = []
    for kind, put in {WRITE: write, INDEX_COPY: _index_copy}.items():
        row: Row = {"layer": layer.name, "tokens": tokens, "kind": kind, "note": ""}
        row |= dict.fromkeys(("us", "low", "high"))
        try:
            row |= _time_to_write(put, layer, tokens, timer, device)._asdict()
            row["us"] = row.pop("median")
        except Exception as fault:
            row["note"] = told(fault)
        release()
        found.append(row)
    return printed(found)


def _time_to_write(put: Writer, layer: Layer, tokens: int, timer: Timer, device: str) -> Time:
    """Keys and values are in the L2 cache, as a layer leaves them; their places are not."""
    shape = (tokens, layer.kv_heads, layer.head_dim)
    key, value = torch.randn(2, *shape, device=device).bfloat16()
    copies = copies_past_cache(2 * key.nbytes)
    pages = -(-copies * tokens // PAGE)
    keys, values = torch.zeros(2, pages, PAGE, *shape[1:], device=device, dtype=key.dtype)
    places = torch.randperm(pages * PAGE, device=device)[: copies * tokens]
    # Each in memory of its own, and so aligned as kernels take it.
    slots = [own.clone() for own in places.view(copies, tokens)]
    put(key, value, keys, values, slots[0])
    for own, cache in ((key, keys), (value, values)):
        relative_error(cache.flatten(0, 1)[slots[0]], own.double(), 0.0)
    return timer(lambda index: put(key, value, keys, values, slots[index % copies]), copies)


def _index_copy(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    keys.flatten(0, 1).index_copy_(0, slots, key)
    values.flatten(0, 1).index_copy_(0, slots, value)


def best(kind: str, build: Builder, timer: Timer) -> Row:
    """The fastest of the ways of a kind, each checked before; a refusal if none is right."""
    rows = []
    try:
        for way in build():
            rows.append(row_of(kind, way, timer))
            del way
    except Exception as fault:
        rows.append(refused(kind, told(fault)))
    release()
    return fastest(rows)


def row_of(kind: str, way: Way, timer: Timer) -> Row:
    """Check one way to attend, then time it."""
    try:
        error = way.check()
        # Some gigabytes a graph, as large caches take milliseconds each.
        launches = launches_over(way.copies, max(1, min(12, int(4e9 / way.nbytes))))
        time = timer(lambda index: way.attend(index % way.copies), launches)
    except Exception as fault:
        return refused(kind, f"{way.name}: {told(fault)}")
    row = dict(zip(("us", "low", "high"), time, strict=True))
    return {"kind": kind, **row, "error": error, "note": way.name, "nbytes": way.nbytes}


def refused(kind: str, why: str) -> Row:
    """A row without a time."""
    empty = dict.fromkeys(("us", "low", "high", "error"))
    return {"kind": kind, **empty, "note": why, "nbytes": None}


def printed(rows: list[Row]) -> list[Row]:
    """The rows with `vs_torch`: how many times as fast as the best of torch."""
    torchs = (SDPA, FLEX, INDEX_COPY)
    times = [row["us"] for row in rows if row["kind"] in torchs and row["us"]]
    for row in rows:
        row["vs_torch"] = min(times) / row["us"] if times and row["us"] else None
        print(" ".join(f"{key} {_number(value)}" for key, value in row.items()), flush=True)
    return rows


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(figures: dict[str, Any], out: Path | None) -> None:
    """Write the result and the headline figures that this script owns."""
    written = [write_result("attention", figures), HEADLINE_FILE]
    layer, context, batch = HEADLINE
    place = (layer.name, context, batch)
    rows = [
        row
        for row in figures["decode"]
        if row["us"] and (row["layer"], row["context"], row["batch"]) == place
    ]
    own = next((row for row in rows if row["kind"] == INT8), None)
    peers = [row for row in rows if row["kind"] in (SDPA, FLEX)]
    if own is not None:
        moved = own["of_copy"] * own["us"]
        spread = (moved / own["high"], moved / own["low"])
        write_headline("attn512_copy_fraction", own["of_copy"], "fraction", spread)
        if peers:
            value, spread = ratio(fastest(peers), own)
            write_headline("attn512_vs_sdpa", value, "ratio", spread)
    for path in written:
        print(f"written: {path}")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out)


if __name__ == "__main__":
    main()
