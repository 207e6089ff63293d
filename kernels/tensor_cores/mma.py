"""Products of some tokens and a packed weight by `mma`, on NVIDIA's cards from sm_80 on."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..formats import TILE
from ..workspace import meet_distributed
from .decode import placed, places, widened, words_a_column, words_at, words_of
from .grouping import share_of

_TILE = gl.constexpr(TILE)


@gluon.jit
def tile_mma(
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
    WORDS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[1, 4], instr_shape=[16, 8]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    EACH: gl.constexpr = words_a_column(KEPT, BITS)
    expert, start, stop = share_of(blocks, tokens, grouped, TOKENS)
    tile = expert * gl.num_programs(1) + gl.program_id(1)
    chunks = gl.where(start < stop, columns // GROUP, 0)
    splits = gl.num_programs(2)
    base = words_at(codes, tile, columns, KEPT, BITS, WORDS)
    low_place, high_place = places(KEPT, WORDS)
    even = gl.allocate_shared_memory(gl.bfloat16, [TOKENS, 64], SHARED)
    odd = gl.allocate_shared_memory(gl.bfloat16, [TOKENS, 64], SHARED)
    token = start + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, WIDE))
    held = x + token[:, None] * columns + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE))[None, :]
    there = (token < stop)[:, None]
    # Column c of the sums: lane c % 8, then the warp, then which of the lane's four rows.
    c = gl.arange(0, _TILE, layout=gl.SliceLayout(0, MMA))
    row = c // 8 % 4 * 32 + c % 8 * 4 + c // 32
    own = scales + tile.to(gl.int64) * (columns // GROUP * _TILE) + row
    total = gl.zeros([TOKENS, _TILE], gl.float32, MMA)
    first = gl.program_id(2)
    next_words = words_of(base + first * (GROUP * EACH), first < chunks, KEPT)
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
            next_words = words_of(base + column * EACH, column < chunks * GROUP, KEPT)
            next_held = gl.load(held + column, mask=there & (column < chunks * GROUP), other=0.0)
            if step % 2 == 0:
                buffer = even
            else:
                buffer = odd
            buffer.store(now)
            wide = widened(placed(words, low_place, high_place, KEPT), KEPT, BITS)
            # From warp, lane, group, half, row, row, i, e, f: half, i, e, group, f by the others.
            wide = gl.permute(wide, [3, 6, 7, 2, 8, 4, 5, 0, 1])
            right = gl.convert_layout(gl.reshape(wide, [64, _TILE]), RIGHT, assert_trivial=True)
            part = mma_v2(buffer.load(LEFT), right, part)
        total += part * factor.to(gl.float32)[None, :]
    number = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, MMA))[:, None]
    meet_distributed(
        y,
        (total,),
        residual,
        epilogue,
        scale,
        partials,
        counters,
        stop,
        rows,
        (gl.program_id(1) * _TILE + row)[None, :],
        (start + number,),
        (number * _TILE + c[None, :],),
        ((TOKENS, 2, 2, 32), (0, 1, 3, 2)),
        1,
    )
