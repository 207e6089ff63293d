"""Products of up to 64 tokens and an N:16 int4 weight by `wgmma` on Hopper, all through memory.

As `wgmma`, but words and scales, too, are copied into shared memory ahead (`phases`). Loaded into
registers, words that are under way at the end of a turn of the loop must be moved to where the next
turn wants them, and a move waits for its load: each turn took as long as the memory, however early
the load was. Nibbles are put in place while the product of the columns before runs.

With EVEN programs share all tiles evenly (`stream_k`), as many as run at once, so that none is left
for a second turn; else a tile is split, as `wgmma` does it, which is faster where sums are small.

What it gave up: stacks of experts, and dense weights, which have less to decode. Tried on an H100
without gain (21504x5376): scales multiplied into the weight, so that no second sum is needed and
three programs have room at 64 tokens (57 us; two 46), operands instead of nibbles made ahead (47),
survivors placed by one shuffle and a mask (49).
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..formats import TILE
from ..workspace import barrier, meet_distributed
from .decode import TINY_TIMES, placed, places, widened
from .phases import after, copy_phase, place_of, scales_of, unknown, words_at_step
from .stream_k import meet_neighbours, pieces, share
from .wgmma import FOURS, factors_of, left_of

_TILE = gl.constexpr(TILE)


@gluon.jit
def _pinned():
    """So that the compiler leaves before this what is written before it."""
    gl.inline_asm_elementwise(
        "bar.warp.sync -1; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _product(
    place,
    side,
    ahead,
    inside,
    start,
    stop,
    last,
    codes,
    scales,
    x,
    sums,
    lines,
    chunks,
    KEPT: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    PHASE: gl.constexpr,
    SIDES: gl.constexpr,
    WORDS: gl.constexpr,
):
    """The sums of a tile's groups `start` to `stop`; then the side, `ahead` and `inside` of now.

    The phases before group `ahead`, which is number `inside` of its tile, are under way.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    STEPS: gl.constexpr = GROUP // 64
    low_place, high_place = places(KEPT, WORDS)
    # What a nibble is too large by.
    constant = gl.full([_TILE, 16], -8.0, gl.bfloat16, LEFT)
    total = gl.zeros([_TILE, TOKENS], gl.float32, MMA)
    running = warpgroup_mma_init(gl.zeros([_TILE, TOKENS], gl.float32, MMA))
    left = gl.zeros([_TILE, 64], gl.bfloat16, LEFT)
    before = gl.zeros([32], gl.int64, FOURS)
    for begin in range(start, stop, PHASE):
        # What was copied last is there, for all threads and the tensor cores.
        async_copy.wait_group(SIDES - 2)
        fence_async_shared()
        barrier()
        end = gl.minimum(begin + PHASE, stop)
        for chunk in range(begin, end):
            number = side * PHASE + chunk - begin
            four = scales_of(place[2], number)
            for step in gl.static_range(STEPS):
                words = words_at_step(place[1], number * STEPS + step, KEPT, WORDS)
                nibbles = placed(words, low_place, high_place, KEPT)
                _pinned()
                part, _, nibbles = warpgroup_mma_wait(0, deps=(running, left, nibbles))
                left = left_of(widened(nibbles, KEPT, 4, True), LEFT)
                if step == 0:
                    total += part * factors_of(before, gl.SliceLayout(1, MMA))[:, None]
                    before = four
                    if chunk == begin:
                        # Nobody reads the other place any more.
                        barrier()
                        copy_phase(
                            *(place, (side + SIDES - 1) % SIDES, codes, scales, x, sums, lines),
                            *(unknown(ahead), inside, chunks, last, KEPT, GROUP),
                        )
                right = place[0].index(number * STEPS + step).permute((1, 0))
                running = warpgroup_mma(left, right, part, use_acc=step > 0, is_async=True)
                if step == 0:
                    correction = place[3].index(number).permute((1, 0))
                    running = warpgroup_mma(constant, correction, running, is_async=True)
        side = (side + 1) % SIDES
        ahead, inside = after(ahead, inside, chunks, last, PHASE)
    part, _ = warpgroup_mma_wait(0, deps=(running, left))
    total += part * factors_of(before, gl.SliceLayout(1, MMA))[:, None]
    return total * TINY_TIMES, side, ahead, inside


@gluon.jit
def tile_staged(
    y,
    x,
    sums,
    codes,
    scales,
    residual,
    partials,
    counters,
    tokens,
    rows,
    columns,
    tiles,
    epilogue,
    scale,
    KEPT: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    PHASE: gl.constexpr,
    SIDES: gl.constexpr,
    EVEN: gl.constexpr,
    WORDS: gl.constexpr,
):
    gl.static_assert(BITS == 4 and KEPT < 16)
    tl.extra.cuda.gdc_launch_dependents()
    chunks = columns // GROUP
    begins = gl.program_id(0) * TOKENS
    if EVEN:
        first, last = share(gl.program_id(1), gl.num_programs(1), tiles * chunks)
    else:
        each = gl.cdiv(chunks, gl.num_programs(2))
        own = gl.program_id(2) * each
        origin = gl.program_id(1) * chunks
        first = origin + gl.minimum(own, chunks)
        last = origin + gl.minimum(own + each, chunks)
    codes = codes.to(gl.pointer_type(gl.int32), bitcast=True)
    scales = scales.to(gl.pointer_type(gl.int64), bitcast=True)
    place = place_of(KEPT, GROUP, TOKENS, PHASE, SIDES)
    x += begins * 64
    sums += begins * 16
    # Whole blocks of tokens are read, whatever is behind the last one.
    lines = tokens + TOKENS
    # The weight was there before; activations and sums are what the kernel before this one writes.
    ahead, inside = first, first % chunks
    for side in gl.static_range(SIDES - 1):
        copy_phase(
            *(place, side, codes, scales, x, sums, lines, ahead, inside, chunks, last),
            *(KEPT, GROUP, 1),
        )
        ahead, inside = after(ahead, inside, chunks, last, PHASE)
    tl.extra.cuda.gdc_wait()
    ahead, inside = first, first % chunks
    for side in gl.static_range(SIDES - 1):
        copy_phase(
            *(place, side, codes, scales, x, sums, lines, ahead, inside, chunks, last),
            *(KEPT, GROUP, 2),
        )
        ahead, inside = after(ahead, inside, chunks, last, PHASE)
    side = 0
    start = first
    if EVEN:
        while start < last:
            tile = start // chunks
            stop = gl.minimum((tile + 1) * chunks, last)
            total, side, ahead, inside = _product(
                *(place, side, ahead, inside, start, stop, last),
                *(codes, scales, x, sums, lines, chunks),
                *(KEPT, GROUP, TOKENS, PHASE, SIDES, WORDS),
            )
            number = unknown(gl.program_id(0))
            programs = unknown(gl.num_programs(1))
            groups = unknown(columns) // GROUP
            meet_neighbours(
                y,
                pieces(total),
                residual,
                epilogue,
                scale,
                partials + number * programs * (2 * _TILE * TOKENS),
                counters + number * tiles + tile,
                unknown(gl.program_id(1)),
                programs,
                tile * groups,
                (tile + 1) * groups,
                tiles * groups,
                tokens,
                rows,
                tile * _TILE,
                number * TOKENS,
                TOKENS,
                4,
            )
            start = stop
    else:
        total, side, ahead, inside = _product(
            *(place, side, ahead, inside, start, last, last, codes, scales, x, sums, lines, chunks),
            *(KEPT, GROUP, TOKENS, PHASE, SIDES, WORDS),
        )
        async_copy.wait_group(0)
        barrier()
        _meet(
            *(y, total, residual, epilogue, scale, partials, counters, begins, tokens, rows),
            TOKENS,
        )
    async_copy.wait_group(0)


@gluon.jit
def _meet(
    y,
    total,
    residual,
    epilogue,
    scale,
    partials,
    counters,
    begins,
    tokens,
    rows,
    TOKENS: gl.constexpr,
):
    """Adds up what programs have of a tile, and stores it."""
    MMA: gl.constexpr = total.type.layout
    # Row r of the sums: lane r % 8, the lower bit of which of its rows, the warp, the higher bit.
    r = gl.arange(0, _TILE, layout=gl.SliceLayout(1, MMA))
    row = ((r // 16 % 4 * 8 + r % 8) * 4 + r // 64 * 2 + r // 8 % 2)[:, None]
    number = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))[None, :]
    meet_distributed(
        y,
        (total,),
        residual,
        epilogue,
        scale,
        partials,
        counters,
        tokens,
        rows,
        gl.program_id(1) * _TILE + row,
        (begins + number,),
        (row * TOKENS + number,),
        ((8, 2, 8, TOKENS), (0, 2, 3, 1)),
        1,
    )
