"""One to four tokens times an N:16 int4 weight in plain Triton, for processors of every make.

As `sparse_gemv`, but x is loaded at the positions, from the cache: about ten instructions for each
survivor and token, which is enough where memory is slower than an H100's.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import misfit
from .errors import KernelInputError
from .formats import SHIPPED, TILE, Format, PackedWeight
from .launching.launch import Kernel, Variant
from .launching.targets import AMD
from .tuning import gemv_plan
from .workspace import meet, workspace

MOST_TOKENS = 4
PIECE = 64
"""Columns of a step."""
_TILE = tl.constexpr(TILE)
_WARPS = tl.constexpr(4)
FEW_TYPES = (
    *("*u8", "*bf16", "*bf16", "*i32", "*fp32", "*i32"),
    *("i32", "i32", "i32", "i32", "i32", "fp32"),
)
"""Codes, scales, residual, experts, partials, counters; sizes and flags; the scale."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _gather(
    y,
    x,
    codes,
    scales,
    residual,
    experts,
    partials,
    counters,
    tokens,
    rows,
    columns,
    added,
    grouped,
    scale,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
):
    row = tl.arange(0, _TILE)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    tile = tl.program_id(0).to(tl.int64)
    if grouped > 0:
        tile += tl.load(experts + tl.program_id(2)) * tl.num_programs(0)
        x += tl.program_id(2) * columns
    codes += tile * (columns // 16 * KEPT * _TILE)
    scales += tile * (columns // GROUP * _TILE)
    total = tl.zeros([_TILE, TOKENS], tl.float32)
    for piece in range(tl.program_id(1), columns // 64, tl.num_programs(1)):
        part = tl.zeros([_TILE, TOKENS], tl.float32)
        for slot in tl.static_range(4 * KEPT):
            code = tl.load(codes + (piece * 4 * KEPT + slot) * _TILE + row).to(tl.int32)
            column = piece * 64 + slot // KEPT * 16 + (code & 15)
            value = ((code << 24) >> 28).to(tl.float32)
            held = tl.load(x + token * columns + column, mask=token < tokens, other=0.0)
            part += value * held.to(tl.float32)
        own = tl.load(scales + piece * 64 // GROUP * _TILE + row)
        total += part * own.to(tl.float32)
    meet(
        y,
        total,
        residual,
        added,
        scale,
        partials,
        counters,
        tokens,
        rows,
        TOKENS=TOKENS,
        WARPS=_WARPS,
        GROUPED=False,
        GATED=GATED,
    )


_gathered = Kernel(
    _gather, name="sparse_gather", grid="tiles, splits, copies", multiples_of_16=("columns",)
)


def supports(format: Format, columns: int) -> bool:
    """Whether the kernels for few tokens take weights of this format."""
    sparse = not format.dense and format.bits == 4
    return sparse and format.group % PIECE == 0 and columns % PIECE == 0


def variants() -> Iterator[Variant]:
    """What the bundle holds: the usual formats, bfloat16 in and out."""
    for format in filter(lambda each: supports(each, PIECE), SHIPPED):
        own = {"KEPT": format.kept, "GROUP": format.group}
        for tokens, gated in product((1, 2, 4), (False, True)):
            constants = {**own, "TOKENS": tokens, "GATED": gated}
            yield Variant(
                _gathered, ("*bf16", "*bf16", *FEW_TYPES), constants, _WARPS.value, 1, AMD
            )


def sparse_gather(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None = None,
    scale: float = 1.0,
    experts: Tensor | None = None,
    gated: bool = False,
) -> None:
    """As `sparse_gemv.sparse_gemv`, on any card, and on the CPU in Triton's interpreter."""
    check_few(x, weight, out, residual, experts, gated)
    tokens, copies = (1, len(x)) if experts is not None else (len(x), 1)
    padded = 1 << (tokens - 1).bit_length()
    pieces = weight.columns // PIECE
    own = {"KEPT": weight.format.kept, "GROUP": weight.format.group}
    _, splits, _ = gemv_plan(x.device, weight.tiles, pieces, padded, copies)
    partials, counters = workspace(x.device)
    tensors = (
        *(weight.codes, weight.scales, out if residual is None else residual),
        *(counters if experts is None else experts, partials, counters),
    )
    flags = (int(residual is not None), int(experts is not None))
    _gathered.launch(
        (weight.tiles, splits, copies),
        *(out, x, *tensors, tokens, weight.rows, weight.columns, *flags, float(scale)),
        constants={**own, "TOKENS": padded, "GATED": gated},
        warps=_WARPS.value,
        stages=1,
    )


def check_few(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    experts: Tensor | None,
    gated: bool,
    dense: bool = False,
) -> None:
    """KernelInputError unless the kernels for few tokens can take these."""
    if dense and not weight.format.dense:
        fault = f"takes dense int4 and int8, not {weight.format}"
    elif not dense and not supports(weight.format, weight.columns):
        fault = f"takes N:16 int4 in groups of 64 or 128, K a multiple of 64, not {weight.format}"
    elif x.dtype not in _DTYPES:
        fault = f"x is {x.dtype}; choose one of {', '.join(map(str, _DTYPES))}"
    elif experts is None and not 1 <= len(x) <= MOST_TOKENS:
        fault = f"x has {len(x)} tokens; it takes 1 to {MOST_TOKENS}"
    else:
        fault = misfit(x, weight, out, residual, experts, gated)
    if fault:
        raise KernelInputError(f"few tokens: {fault}")
