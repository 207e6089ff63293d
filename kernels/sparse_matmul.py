"""Five to some hundred tokens times an N:16 int4 weight on NVIDIA's tensor cores.

y[m, r] = sum of x[m, k] * code * scale, with each weight decoded once for all tokens of a program
(`survivors` tells how) and never written anywhere. A program has a tile of 128 rows, up to 128
tokens and every `splits`-th group of columns; four warps have 32 rows each. Its activations pass
through shared memory, in the interleaved order. Sums of a scale's columns are exact products of
integers and bfloat16 in float32; then they are scaled.

Two kernels: on Hopper `wgmma` has the weight in registers and runs while the next columns are
decoded; at more than 64 tokens there is no room for a second sum, so that the scale is multiplied
into the bfloat16 weight, which costs one more rounding (relative error 2.2e-3 against 1.7e-3).
Elsewhere from sm_80 on `mma` does. Bytes moved: the packed weight once for every 64 or 128 tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .errors import KernelInputError
from .formats import SHIPPED, TILE, Format, PackedWeight
from .launching.launch import Kernel, Variant
from .launching.targets import NVIDIA, target_of
from .survivors import STEP, interleave, places, widened, word_layout, words_of
from .tuning import matmul_splits
from .workspace import barrier, meet_distributed, workspace

WARPS = 4
_TILE = gl.constexpr(TILE)


@gluon.jit
def _sparse_mma(
    y,
    x,
    codes,
    scales,
    residual,
    partials,
    counters,
    tokens,
    rows,
    columns,
    added,
    scale,
    KEPT: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    WORDS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[1, 4], instr_shape=[16, 8]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    tile = gl.program_id(1)
    chunks = columns // GROUP
    splits = gl.num_programs(2)
    word = gl.arange(0, 32, layout=gl.SliceLayout(1, WORDS))
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, WORDS))
    base = codes.to(gl.pointer_type(gl.int32), bitcast=True) + tile * (columns * KEPT * 2)
    base = base + word[:, None] + (group * (KEPT * 32))[None, :]
    low_place, high_place = places(32, WORDS)
    even = gl.allocate_shared_memory(gl.bfloat16, [TOKENS, 64], SHARED)
    odd = gl.allocate_shared_memory(gl.bfloat16, [TOKENS, 64], SHARED)
    token = gl.program_id(0) * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, WIDE))
    held = x + token[:, None] * columns + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE))[None, :]
    there = (token < tokens)[:, None]
    # Column c of the sums: lane c % 8, then the warp, then which of the lane's four rows.
    c = gl.arange(0, _TILE, layout=gl.SliceLayout(0, MMA))
    row = c // 8 % 4 * 32 + c % 8 * 4 + c // 32
    own = scales + tile * (chunks * _TILE) + row
    total = gl.zeros([TOKENS, _TILE], gl.float32, MMA)
    first = gl.program_id(2)
    next_words = words_of(base + first * (GROUP * KEPT * 2), first < chunks, KEPT)
    next_held = gl.load(held + first * GROUP, mask=there & (first < chunks), other=0.0)
    for chunk in range(first, chunks, splits):
        part = gl.zeros([TOKENS, _TILE], gl.float32, MMA)
        factor = gl.load(own + chunk * _TILE)
        for step in gl.static_range(GROUP // 64):
            words = next_words
            now = next_held
            if step + 1 < GROUP // 64:
                column = chunk * GROUP + (step + 1) * 64
            else:
                column = (chunk + splits) * GROUP
            next_words = words_of(base + column * (KEPT * 2), column < columns, KEPT)
            next_held = gl.load(held + column, mask=there & (column < columns), other=0.0)
            if step % 2 == 0:
                buffer = even
            else:
                buffer = odd
            buffer.store(now)
            wide = gl.reshape(
                widened(words, low_place, high_place, KEPT), [4, 8, 4, 2, 2, 2, 2, 2, 2]
            )
            # From warp, lane, group, half, row, row, i, e, f: half, i, e, group, f by the others.
            wide = gl.permute(wide, [3, 6, 7, 2, 8, 4, 5, 0, 1])
            right = gl.convert_layout(gl.reshape(wide, [64, _TILE]), RIGHT, assert_trivial=True)
            part = mma_v2(buffer.load(LEFT), right, part)
        total += part * factor.to(gl.float32)[None, :]
    token = gl.program_id(0) * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, MMA))[:, None]
    flat = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, MMA))[:, None] * _TILE + c[None, :]
    row = (tile * _TILE + row)[None, :]
    meet_distributed(
        y, total, residual, added, scale, partials, counters, tokens, rows, row, token, flat
    )


@gluon.jit
def _decoded(
    words, low_place, high_place, factor, KEPT: gl.constexpr, FOLD: gl.constexpr, LEFT: gl.constexpr
):
    """bfloat16 [128, 64] of the weight as wgmma's left operand; times the rows' scales if FOLD."""
    wide = gl.reshape(widened(words, low_place, high_place, KEPT), [4, 8, 4, 2, 2, 2, 2, 2, 2])
    # From warp, lane, group, half, row, row, i, e, f: row, warp, row, lane by the others.
    wide = gl.permute(wide, [4, 0, 5, 1, 3, 6, 7, 2, 8])
    left = gl.convert_layout(gl.reshape(wide, [_TILE, 64]), LEFT, assert_trivial=True)
    if FOLD:
        factor = gl.convert_layout(factor, gl.SliceLayout(1, LEFT))[:, None]
        left = gl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;",
            "=r,r,r",
            [left, factor],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return left


@gluon.jit
def _sparse_wgmma(
    y,
    x,
    codes,
    scales,
    residual,
    partials,
    counters,
    tokens,
    rows,
    columns,
    added,
    scale,
    KEPT: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    FOLD: gl.constexpr,
    WORDS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tile = gl.program_id(1)
    chunks = columns // GROUP
    each = gl.cdiv(chunks, gl.num_programs(2))
    first = gl.program_id(2) * each
    last = gl.minimum(first + each, chunks)
    begin = first * GROUP
    end = last * GROUP
    word = gl.arange(0, 32, layout=gl.SliceLayout(1, WORDS))
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, WORDS))
    base = codes.to(gl.pointer_type(gl.int32), bitcast=True) + tile * (columns * KEPT * 2)
    base = base + word[:, None] + (group * (KEPT * 32))[None, :]
    low_place, high_place = places(32, WORDS)
    buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, 64], SHARED)
    token = gl.program_id(0) * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, WIDE))
    held = x + token[:, None] * columns + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE))[None, :]
    there = (token < tokens)[:, None]
    # Row r of the sums: lane r % 8, the lower bit of which of its rows, the warp, the higher bit.
    r = gl.arange(0, _TILE, layout=gl.SliceLayout(1, MMA))
    row = (r // 16 % 4 * 8 + r % 8) * 4 + r // 64 * 2 + r // 8 % 2
    own = scales + tile * (chunks * _TILE) + row
    for stage in gl.static_range(STAGES - 1):
        column = begin + stage * 64
        async_copy.async_copy_global_to_shared(
            buffers.index(stage), held + column, mask=there & (column < end)
        )
        async_copy.commit_group()
    words = words_of(base + begin * (KEPT * 2), begin < end, KEPT)
    next_words = words_of(base + (begin + 64) * (KEPT * 2), begin + 64 < end, KEPT)
    factor = gl.load(own + first * _TILE, mask=(r >= 0) & (first < last), other=0.0)
    left = _decoded(words, low_place, high_place, factor, KEPT, FOLD, LEFT)
    total = gl.zeros([_TILE, TOKENS], gl.float32, MMA)
    part = gl.zeros([_TILE, TOKENS], gl.float32, MMA)
    slot = 0
    for chunk in range(first, last):
        later = factor
        if FOLD:
            later = gl.load(
                own + (chunk + 1) * _TILE, mask=(r >= 0) & (chunk + 1 < last), other=0.0
            )
        else:
            factor = gl.load(own + chunk * _TILE)
        for step in gl.static_range(GROUP // 64):
            column = chunk * GROUP + step * 64
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            barrier()
            running = warpgroup_mma(
                left,
                buffers.index(slot).permute((1, 0)),
                part,
                use_acc=FOLD or step > 0,
                is_async=True,
            )
            words = next_words
            next_words = words_of(base + (column + 128) * (KEPT * 2), column + 128 < end, KEPT)
            ahead = column + (STAGES - 1) * 64
            async_copy.async_copy_global_to_shared(
                buffers.index((slot + STAGES - 1) % STAGES),
                held + ahead,
                mask=there & (ahead < end),
            )
            async_copy.commit_group()
            if step + 1 == GROUP // 64:
                following = later
            else:
                following = factor
            next_left = _decoded(words, low_place, high_place, following, KEPT, FOLD, LEFT)
            part, left = warpgroup_mma_wait(num_outstanding=0, deps=(running, left))
            left = next_left
            slot = (slot + 1) % STAGES
        if FOLD:
            factor = later
        else:
            total += part * factor.to(gl.float32)[:, None]
    if FOLD:
        total = part
    token = gl.program_id(0) * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))[None, :]
    flat = r[:, None] * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))[None, :]
    row = (tile * _TILE + row)[:, None]
    meet_distributed(
        y, total, residual, added, scale, partials, counters, tokens, rows, row, token, flat
    )


_MULTIPLES = ("columns",)
_GRID = "cdiv(tokens, TOKENS), tiles, splits"
_interleaved = Kernel(interleave, grid="cdiv(count, BLOCK)", multiples_of_16=("count",))
_mma = Kernel(_sparse_mma, grid=_GRID, multiples_of_16=_MULTIPLES)
_wgmma = Kernel(_sparse_wgmma, grid=_GRID, multiples_of_16=_MULTIPLES)
_WORDS = word_layout(WARPS)
_BLOCK = 1024
_HOPPER = tuple(target for target in NVIDIA if target.capability == 90)
_OTHERS = tuple(target for target in NVIDIA if target.capability != 90)


def supports(format: Format, columns: int) -> bool:
    """Whether `sparse_matmul` takes weights of this format."""
    sparse = not format.dense and format.bits == 4
    return sparse and format.group % STEP == 0 and columns % STEP == 0


def _plan(format: Format, tokens: int, hopper: bool) -> tuple[Kernel, dict[str, object]]:
    """The kernel for so many tokens, and its constants."""
    most = 128 if hopper else 64
    block = max(16, min(most, 1 << (tokens - 1).bit_length()))
    constants = {"KEPT": format.kept, "GROUP": format.group, "TOKENS": block, "WORDS": _WORDS}
    if not hopper:
        return _mma, constants
    return _wgmma, {**constants, "STAGES": 4 if block == 16 else 3, "FOLD": block > 64}


def variants() -> Iterator[Variant]:
    """What the bundle holds: the usual formats."""
    for target in NVIDIA:
        overlap = target.capability >= 90
        order = {"BLOCK": _BLOCK, "OVERLAP": overlap}
        copied = ("*bf16", "*bf16", "i32")
        yield Variant(_interleaved, copied, order, 4, 1, (target,), _options(overlap))
    types = ("*bf16", "*bf16", "*u8", "*bf16", "*bf16", "*fp32", "*i32", *["i32"] * 4, "fp32")
    for format in filter(lambda each: supports(each, STEP * 2), SHIPPED):
        for targets, sizes in ((_HOPPER, (16, 32, 64, 128)), (_OTHERS, (16, 32, 64))):
            for tokens in sizes:
                kernel, constants = _plan(format, tokens, targets is _HOPPER)
                yield Variant(kernel, types, constants, WARPS, 1, targets)


def _options(overlap: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if overlap else {}


def sparse_matmul(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """(x weight^T + residual) * scale of bfloat16 [tokens, K] into `out` [tokens, R].

    All contiguous and on one NVIDIA card from sm_80 on; results depend on no timing. Meant for 5 to
    some hundred tokens. Raises `KernelInputError` if something does not fit.
    """
    _check(x, weight, out, residual)
    target = target_of(x.get_device())
    tokens = len(x)
    kernel, constants = _plan(weight.format, tokens, target.capability == 90)
    overlap = target.capability >= 90
    ordered = torch.empty_like(x)
    _interleaved.launch(
        (-(-x.numel() // _BLOCK),),
        *(ordered, x, x.numel()),
        constants={"BLOCK": _BLOCK, "OVERLAP": overlap},
        warps=4,
        stages=1,
        options=_options(overlap),
    )
    blocks = -(-tokens // int(constants["TOKENS"]))  # type: ignore[call-overload]
    splits = matmul_splits(
        x.device,
        weight.tiles,
        weight.columns // weight.format.group,
        blocks,
        constants["TOKENS"],
    )
    kernel.launch(
        (blocks, weight.tiles, splits),
        *(out, ordered, weight.codes, weight.scales, out if residual is None else residual),
        *workspace(x.device),
        *(tokens, weight.rows, weight.columns, int(residual is not None), float(scale)),
        constants=constants,
        warps=WARPS,
        stages=1,
    )


def _check(x: Tensor, weight: PackedWeight, out: Tensor, residual: Tensor | None) -> None:
    """KernelInputError unless `sparse_matmul` can take these."""
    fault = ""
    if not supports(weight.format, weight.columns) or weight.experts is not None:
        fault = f"takes one weight of N:16 int4 in groups of 64 or 128, not {weight.format}"
    elif x.dim() != 2 or x.shape[1] != weight.columns or x.dtype != torch.bfloat16:
        fault = f"x is {x.dtype} {tuple(x.shape)}; it must be bfloat16 [tokens, {weight.columns}]"
    for name, tensor in (("out", out), ("residual", residual)):
        wanted = (len(x), weight.rows)
        if tensor is not None and (tuple(tensor.shape) != wanted or tensor.dtype != x.dtype):
            fault = fault or f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {wanted}"
    for name, tensor in (("x", x), ("out", out), ("residual", residual)):
        if tensor is not None and not tensor.is_contiguous():
            fault = fault or f"{name} is not contiguous"
        if tensor is not None and tensor.device != weight.device:
            fault = fault or f"{name} is on {tensor.device}, the weight on {weight.device}"
    if x.device.type != "cuda" or torch.version.hip is not None:
        fault = fault or "runs on NVIDIA's cards alone"
    if fault:
        raise KernelInputError(f"sparse_matmul: {fault}")
