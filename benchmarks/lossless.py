"""How fast are lossless codes decoded, beside a copy of as many bytes?

Linears of the 31B shape with random weights, in 5:16 int4 (positions as ranks) and in bfloat16
(exponents in three bits). What the kernel decodes is compared with what was coded, bit by bit,
before it is timed; each launch takes another copy, so that none lies in the cache. Told are
microseconds, GB/s of bytes read and written, and that over the rate of a copy on the same card.

Run it as `python -m benchmarks.lossless` on a machine with one card.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conclave.kernels.formats import Format, tensor_shapes
from conclave.kernels.lossless import ranks
from conclave.kernels.lossless.codes import Code, code_of, decode, encode

from .clock import Time, copies_past_cache, copy_rate, launches_over, replayed
from .records import machine, write_result

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((43008, 5376), (5376, 21504))
TINY = ((300, 256), (128, 512))
FORMAT = Format.parse("5:16-int4-g128")


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes, untimed; write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        raise SystemExit("no GPU; this measures one (or give --dry)")
    figures = measure(TINY if options.dry else SHAPES, options.dry)
    print(json.dumps(figures, indent=1))
    if not options.dry:
        path = write_result("lossless", figures)
        if options.out:
            shutil.copy(path, options.out)


def measure(shapes: tuple[tuple[int, int], ...], dry: bool = False) -> dict[str, Any]:
    """All figures."""
    copied = 0.0 if dry else copy_rate().median
    print(f"{machine()}: a copy {copied:.0f} GB/s", flush=True)
    rows = [
        {"kind": kind, "shape": list(shape)} | decoding(code, tensor, copied)
        for shape in shapes
        for kind, code, tensor in tensors(*shape)
    ]
    return {"copy_gb_per_s": copied, "decoded": rows}


def tensors(rows: int, columns: int) -> Iterator[tuple[str, Code, Tensor]]:
    """Random ones of both kinds, with their codes."""
    shape, dtype = tensor_shapes(FORMAT, rows, columns)["codes"]
    code = code_of("codes", FORMAT, shape, dtype)
    assert code is not None
    yield str(FORMAT), code, sparse_codes(shape)
    code = code_of("plain", None, (rows, columns), torch.bfloat16)
    assert code is not None
    yield "bfloat16", code, torch.randn(rows, columns, device=DEVICE).mul_(0.02).bfloat16()


def sparse_codes(shape: tuple[int, ...]) -> Tensor:
    """uint8 of N:16 int4: any positions, any values."""
    *stack, kept, rows = shape
    ways = ranks.nibbles(kept).to(DEVICE)
    drawn = ways[torch.randint(len(ways), (*stack, rows), device=DEVICE)]
    made = torch.randint(16, shape, dtype=torch.uint8, device=DEVICE) << 4
    for slot in range(kept):
        made[..., slot, :] |= ((drawn >> 4 * slot) & 15).to(torch.uint8)
    return made


def decoding(code: Code, tensor: Tensor, copied: float) -> dict[str, Any]:
    """Checks, and unless `copied` is 0 times, one kind of one shape."""
    coded = encode(code, tensor)
    out = torch.empty_like(tensor)
    out.view(torch.uint8).fill_(0xA5)
    decode(code, coded, out)
    if not torch.equal(out.view(torch.uint8), tensor.view(torch.uint8)):
        raise SystemExit(f"{code} decodes to something else; no speed is told")
    told: dict[str, Any] = {"of_plain_bytes": code.bytes / code.plain_bytes}
    if not copied:
        return told
    copies = copies_past_cache(code.bytes + code.plain_bytes)
    sources = [coded, *(coded.clone() for _ in range(copies - 1))]
    targets = [out, *(torch.empty_like(out) for _ in range(copies - 1))]

    def launch(index: int) -> None:
        decode(code, sources[index % copies], targets[index % copies])

    time: Time = replayed(launch, launches_over(copies))
    rate = (code.bytes + code.plain_bytes) / time.median / 1e3
    return told | {
        "microseconds": time.median,
        "spread": [time.low, time.high],
        "gb_per_s": rate,
        "of_a_copy": rate / copied,
    }


if __name__ == "__main__":
    main()
