"""How fast are weights decoded from their lossless codes?

The large weights of a 31B-shaped layer, random: 5:16 int4 (ranks of positions) and bfloat16
(exponents in levels of two bits). What is decoded is first compared with what was encoded, byte for
byte; then the decoding is timed as launches of a CUDA graph, each of memory of its own. Rates are
of the bytes read and written, beside the device's copy in the same run. `--dry` compares small ones
anywhere and times nothing.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conclave.kernels.formats import Format
from conclave.kernels.layouts import pack
from conclave.kernels.lossless.codes import Code, code_of, decode, encode

from .clock import copies_past_cache, copy_rate, launches_over, replayed
from .records import machine, write_result
from .rows import Row

SHAPES = ((43008, 5376), (5376, 21504))
"""Gate and up, and down."""
FORMATS = ("5:16-int4-g128", None)
_PACKED = 1024
"""Rows that are packed; a weight repeats them."""


def main() -> None:
    """Compare, time, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="small weights; write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        raise SystemExit("no GPU; this measures kernels on one (or give --dry)")
    figures = measure(options.dry)
    if not options.dry:
        path = write_result("lossless", figures)
        print(f"written: {path}")
        if options.out is not None:
            shutil.copy(path, options.out)


def measure(dry: bool) -> dict[str, Any]:
    """All figures."""
    torch.manual_seed(0)
    rate = 1.0 if dry else copy_rate().median
    print(f"{machine()}: copy {rate:.0f} GB/s")
    shapes = [(384, 256)] if dry else SHAPES
    rows = [row_of(text, *shape, rate, dry) for text in FORMATS for shape in shapes]
    return {"copy_gb_per_s": rate, "rows": rows}


def row_of(text: str | None, rows: int, columns: int, rate: float, dry: bool) -> Row:
    """One weight's: shorter by what, decoded how fast."""
    format = None if text is None else Format.parse(text)
    field = "plain" if format is None else "codes"
    tensor = weight(format, rows, columns, "cpu" if dry else "cuda")
    code = code_of(field, format, tuple(tensor.shape), tensor.dtype)
    assert code is not None
    coded = encode(code, tensor)
    check(code, coded, tensor)
    row: Row = {
        "format": text or "bfloat16",
        "shape": f"{rows}x{columns}",
        "bits": 8 * code.bytes / (rows * columns),
        "of_plain": code.bytes / code.plain_bytes,
    }
    if not dry:
        row |= timed(code, coded, tensor, rate)
    print(
        " ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
        ),
        flush=True,
    )
    return row


def weight(format: Format | None, rows: int, columns: int, device: str) -> Tensor:
    """bfloat16 [rows, columns], or the codes of as many rows in `format`."""
    if format is None:
        plain = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
        return plain.mul_(columns**-0.5)
    some = min(rows, _PACKED)
    codes = pack(torch.randn(some, columns, device=device), format).codes
    return codes.repeat(-(-rows // some), 1, 1, 1)[: -(-rows // 128)].contiguous()


def check(code: Code, coded: Tensor, tensor: Tensor) -> None:
    """AssertionError if what is decoded differs in a byte."""
    out = torch.empty_like(tensor)
    out.view(torch.uint8).fill_(0xA5)
    decode(code, coded, out)
    assert torch.equal(out.view(torch.uint8), tensor.view(torch.uint8))


def timed(code: Code, coded: Tensor, tensor: Tensor, rate: float) -> Row:
    """Microseconds, and the share of a copy's rate; of several copies, past the cache."""
    moved = code.bytes + code.plain_bytes
    copies = copies_past_cache(moved)
    sources = [coded.clone() for _ in range(copies)]
    targets = [torch.empty_like(tensor) for _ in range(copies)]
    time = replayed(
        lambda index: decode(code, sources[index % copies], targets[index % copies]),
        launches=launches_over(copies),
    )
    speed = moved / time.median / 1e3
    return {
        "us": time.median,
        "low": time.low,
        "high": time.high,
        "gb_per_s": speed,
        "of_copy": speed / rate,
    }


if __name__ == "__main__":
    main()
