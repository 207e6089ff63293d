"""Products of some tokens and a packed weight by `wgmma`, on Hopper.

The weight is the left operand, in registers, and the next columns are decoded while the tensor
cores work. At more than 64 tokens there is no room for a second sum, so that the scale is
multiplied into the bfloat16 weight (FOLD), which costs one more rounding: relative error 2.2e-3
against 1.7e-3.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..formats import TILE
from ..workspace import barrier, meet_distributed
from .decode import places, widened, words_a_column, words_at, words_of
from .grouping import share_of

_TILE = gl.constexpr(TILE)


@gluon.jit
def _decoded(
    words,
    low_place,
    high_place,
    factor,
    KEPT: gl.constexpr,
    BITS: gl.constexpr,
    FOLD: gl.constexpr,
    LEFT: gl.constexpr,
):
    """bfloat16 [128, 64] of the weight as wgmma's left operand; times the rows' scales if FOLD."""
    wide = widened(words, low_place, high_place, KEPT, BITS)
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
def _halves(values):
    ROWS: gl.constexpr = values.shape[0]
    HALF: gl.constexpr = values.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(values, [ROWS, 2, HALF]), [0, 2, 1]))


@gluon.jit
def _quarters(values):
    first, last = _halves(values)
    return _halves(first) + _halves(last)


@gluon.jit
def tile_wgmma(
    y,
    x,
    codes,
    scales,
    residual,
    blocks,
    partials,
    counters,
    tokens,
    rows,
    columns,
    epilogue,
    grouped,
    scale,
    KEPT: gl.constexpr,
    BITS: gl.constexpr,
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
    EACH: gl.constexpr = words_a_column(KEPT, BITS)
    expert, start, stop = share_of(blocks, tokens, grouped, TOKENS)
    tile = expert * gl.num_programs(1) + gl.program_id(1)
    chunks = columns // GROUP
    each = gl.cdiv(chunks, gl.num_programs(2))
    first = gl.program_id(2) * each
    last = gl.where(start < stop, gl.minimum(first + each, chunks), first)
    begin = first * GROUP
    end = last * GROUP
    base = words_at(codes, tile, columns, KEPT, BITS, WORDS)
    low_place, high_place = places(KEPT, WORDS)
    buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, 64], SHARED)
    token = start + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, WIDE))
    held = x + token[:, None] * columns + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE))[None, :]
    there = (token < stop)[:, None]
    # Row r of the sums: lane r % 8, the lower bit of which of its rows, the warp, the higher bit.
    r = gl.arange(0, _TILE, layout=gl.SliceLayout(1, MMA))
    row = (r // 16 % 4 * 8 + r % 8) * 4 + r // 64 * 2 + r // 8 % 2
    own = scales + tile.to(gl.int64) * (chunks * _TILE) + row
    for stage in gl.static_range(STAGES - 1):
        column = begin + stage * 64
        async_copy.async_copy_global_to_shared(
            buffers.index(stage), held + column, mask=there & (column < end)
        )
        async_copy.commit_group()
    words = words_of(base + begin * EACH, begin < end, KEPT)
    next_words = words_of(base + (begin + 64) * EACH, begin + 64 < end, KEPT)
    factor = gl.load(own + first * _TILE, mask=(r >= 0) & (first < last), other=0.0)
    left = _decoded(words, low_place, high_place, factor, KEPT, BITS, FOLD, LEFT)
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
            next_words = words_of(base + (column + 128) * EACH, column + 128 < end, KEPT)
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
            next_left = _decoded(words, low_place, high_place, following, KEPT, BITS, FOLD, LEFT)
            part, left = warpgroup_mma_wait(num_outstanding=0, deps=(running, left))
            left = next_left
            slot = (slot + 1) % STAGES
        if FOLD:
            factor = later
        else:
            total += part * factor.to(gl.float32)[:, None]
    # Copies of zeros beyond the end may still be under way, into memory that what follows uses.
    async_copy.wait_group(0)
    barrier()
    if FOLD:
        total = part
    number = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))[None, :]
    if TOKENS > 64:
        totals = _quarters(total)
        numbers = _quarters(number + gl.zeros_like(total).to(gl.int32))
        row = _quarters(row[:, None] + gl.zeros_like(total).to(gl.int32))[0]
    else:
        totals = (total,)
        numbers = (number,)
        row = row[:, None]
    COUNT: gl.constexpr = 4 if TOKENS > 64 else 1
    EACH_HAS: gl.constexpr = TOKENS // COUNT
    tokens_of = ()
    flats = ()
    for i in gl.static_range(COUNT):
        tokens_of = tokens_of + (start + numbers[i],)
        flats = flats + (row * TOKENS + numbers[i],)
    meet_distributed(
        y,
        totals,
        residual,
        epilogue,
        scale,
        partials,
        counters,
        stop,
        rows,
        gl.program_id(1) * _TILE + row,
        tokens_of,
        flats,
        ((8, 2, 8, EACH_HAS), (0, 2, 3, 1)),
        COUNT,
    )
