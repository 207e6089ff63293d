"""Products of some tokens and a packed weight by `wgmma`, on Hopper.

The weight is the left operand, in registers. Activations of some groups of columns (PHASE) are
copied into shared memory at once, into one of two places in turn, so that there is a barrier for
each phase alone; the loop over its columns has none. Words are loaded two steps of 64 columns ahead
of their use (AHEAD is 2), or one, and the groups after are brought into the L2 cache.

Weights of four bits are tiny numbers (`decode`), and a product of each group takes their bias away.
Several programs fit a processor: while one decodes another multiplies. At more than 64 tokens there
is no room for a second sum, so that the scale is multiplied into the bfloat16 weight (FOLD), which
costs one more rounding: relative error 2.2e-3 against 1.7e-3.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..formats import SPAN, TILE
from ..workspace import barrier, meet_distributed
from .decode import TINY_TIMES, placed, places, widened, words_a_column, words_at, words_of
from .grouping import share_of

_TILE = gl.constexpr(TILE)
_SPAN = gl.constexpr(SPAN)
_FETCHED = gl.constexpr(2)
"""Groups of columns brought into the L2 cache before they are loaded."""


FOURS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0], [0], [1], [2], [4]],
        warp_bases=[[8], [16]],
        block_bases=[],
        shape=[32],
    )
)
"""Of the scales of four rows, as the lanes have words."""

# The float32 of four bfloat16.
_FOUR = gl.constexpr(
    "{ .reg .b32 low, high; mov.b64 {low, high}, $4;"
    "shl.b32 $0, low, 16; and.b32 $1, low, 0xFFFF0000;"
    "shl.b32 $2, high, 16; and.b32 $3, high, 0xFFFF0000; }"
)


@gluon.constexpr_function
def has_tiny(bits, tokens):
    """Whether a program with so many tokens makes tiny numbers of such a weight."""
    return bits == 4 and tokens <= 64


@gluon.jit
def factors_of(four, ROWS: gl.constexpr):
    """float32 [128] of the scales of lanes' four rows, in the order of the sums."""
    row0, row1, row2, row3 = gl.inline_asm_elementwise(
        _FOUR,
        "=&r,=&r,=&r,=&r,l",
        [four],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )
    rows = gl.join(gl.join(row0, row2), gl.join(row1, row3))
    # From warp, lane, row, row: row, warp, row, lane.
    rows = gl.permute(gl.reshape(rows, [4, 8, 2, 2]), [2, 0, 3, 1])
    return gl.convert_layout(gl.reshape(rows, [_TILE]), ROWS, assert_trivial=True)


@gluon.jit
def left_of(wide, LEFT: gl.constexpr):
    """bfloat16 [128, 64] as wgmma's left operand of what `widened` gave."""
    # From warp, lane, group, half, row, row, i, e, f: row, warp, row, lane by the others.
    wide = gl.permute(wide, [4, 0, 5, 1, 3, 6, 7, 2, 8])
    return gl.convert_layout(gl.reshape(wide, [_TILE, 64]), LEFT, assert_trivial=True)


@gluon.jit
def _decoded(
    nibbles,
    factor,
    KEPT: gl.constexpr,
    BITS: gl.constexpr,
    FOLD: gl.constexpr,
    TINY: gl.constexpr,
    LEFT: gl.constexpr,
):
    """bfloat16 [128, 64] of the weight as wgmma's left operand; times the rows' scales if FOLD."""
    left = left_of(widened(nibbles, KEPT, BITS, TINY), LEFT)
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
def _prefetch(place, thread, size):
    """Brings bytes from the place of thread 0 into the L2 cache."""
    gl.inline_asm_elementwise(
        "{ .reg .pred first; setp.eq.s32 first, $2, 0;"
        "@first cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [place.to(gl.int64, bitcast=True), thread, size],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _copy(
    tiles, corrections, held, own_sums, lines, first, last, PHASE: gl.constexpr, STEPS: gl.constexpr
):
    """Starts to copy the activations of up to PHASE groups of columns, and their sums."""
    for chunk in range(first, gl.minimum(first + PHASE, last)):
        for step in gl.static_range(STEPS):
            async_copy.async_copy_global_to_shared(
                tiles.index((chunk - first) * STEPS + step),
                held + (chunk * STEPS + step) * (lines * 64),
            )
        if corrections is not None:
            async_copy.async_copy_global_to_shared(
                corrections.index(chunk - first), own_sums + chunk * (lines * 16)
            )
    async_copy.commit_group()


@gluon.jit
def _phase(
    tiles,
    corrections,
    constant,
    first,
    stop,
    last,
    base,
    origin,
    thread,
    own,
    low_place,
    high_place,
    state,
    KEPT: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    AHEAD: gl.constexpr,
    MMA: gl.constexpr,
):
    """Multiplies the groups of columns `first` to `stop`, whose activations are in `tiles`."""
    STEPS: gl.constexpr = GROUP // 64
    EACH: gl.constexpr = words_a_column(KEPT, BITS)
    FOLD: gl.constexpr = TOKENS > 64
    TINY: gl.constexpr = has_tiny(BITS, TOKENS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    total, part, nibbles, factor, queue = state
    for chunk in range(first, stop):
        now = factor
        factor = gl.load(own + gl.minimum(chunk + 1, last - 1) * (_TILE if FOLD else 32))
        if AHEAD == 1:
            behind = gl.maximum(chunk + _FETCHED + 1 - last, 0)
            fetch = origin + (chunk + _FETCHED) * (GROUP * EACH)
            _prefetch(fetch, thread + behind, GROUP * EACH * 4)
        for step in gl.static_range(STEPS):
            left = _decoded(nibbles, now, KEPT, BITS, FOLD, TINY, LEFT)
            tile = tiles.index((chunk - first) * STEPS + step).permute((1, 0))
            running = warpgroup_mma(left, tile, part, use_acc=FOLD or step > 0, is_async=True)
            if step == 0 and TINY:
                correction = corrections.index(chunk - first).permute((1, 0))
                running = warpgroup_mma(constant, correction, running, is_async=True)
            words = queue[0]
            ahead = gl.minimum(chunk + (step + 1 + AHEAD) // STEPS, last - 1)
            place = base + ahead * (GROUP * EACH) + (step + 1 + AHEAD) % STEPS * (64 * EACH)
            fetched = words_of(place, None, KEPT)
            queue = queue[1:] + (fetched,)
            nibbles = placed(words, low_place, high_place, KEPT)
            if KEPT < _SPAN and TOKENS > 16 and step + 1 == STEPS:
                # So that the compiler leaves the decoding before the wait.
                gl.inline_asm_elementwise(
                    "bar.warp.sync -1; mov.b32 $0, 0;",
                    "=r",
                    [],
                    dtype=gl.int32,
                    is_pure=False,
                    pack=1,
                )
                part, _, nibbles = warpgroup_mma_wait(
                    num_outstanding=0, deps=(running, left, nibbles)
                )
            else:
                part, _ = warpgroup_mma_wait(num_outstanding=0, deps=(running, left))
        if not FOLD:
            total += part * factors_of(now, gl.SliceLayout(1, MMA))[:, None]
    return total, part, nibbles, factor, queue


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
    sums,
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
    PHASE: gl.constexpr,
    AHEAD: gl.constexpr,
    WORDS: gl.constexpr,
):
    FOLD: gl.constexpr = TOKENS > 64
    TINY: gl.constexpr = has_tiny(BITS, TOKENS)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SHARED_SUMS: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=32, element_bitwidth=16, rank=2
    )
    EACH: gl.constexpr = words_a_column(KEPT, BITS)
    STEPS: gl.constexpr = GROUP // 64
    tl.extra.cuda.gdc_launch_dependents()
    if grouped > 0:
        tl.extra.cuda.gdc_wait()
    expert, start, stop = share_of(blocks, tokens, grouped, TOKENS)
    tile = (expert * gl.num_programs(1) + gl.program_id(1)).to(gl.int64)
    chunks = columns // GROUP
    each = gl.cdiv(chunks, gl.num_programs(2))
    first = gl.program_id(2) * each
    last = gl.where(start < stop, gl.minimum(first + each, chunks), first)
    base = words_at(codes, tile, columns, KEPT, BITS, WORDS)
    low_place, high_place = places(KEPT, WORDS)
    # Row r of the sums: lane r % 8, the lower bit of which of its rows, the warp, the higher bit.
    r = gl.arange(0, _TILE, layout=gl.SliceLayout(1, MMA))
    row = (r // 16 % 4 * 8 + r % 8) * 4 + r // 64 * 2 + r // 8 % 2
    if FOLD:
        own = scales + tile * (chunks * _TILE) + row
    else:
        four = gl.arange(0, 32, layout=FOURS)
        own = scales.to(gl.pointer_type(gl.int64), bitcast=True) + tile * (chunks * 32) + four
    # Programs without columns read what is there.
    near = gl.minimum(first, chunks - 1)
    words = words_of(base + near * (GROUP * EACH), None, KEPT)
    queue = ()
    for step in gl.static_range(1, AHEAD + 1):
        ahead = gl.minimum(near + step // STEPS, chunks - 1)
        place = base + ahead * (GROUP * EACH) + step % STEPS * (64 * EACH)
        queue = queue + (words_of(place, None, KEPT),)
    factor = gl.load(own + near * (_TILE if FOLD else 32))
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    origin = codes.to(gl.pointer_type(gl.int32), bitcast=True) + tile * (columns * EACH)
    if AHEAD == 1:
        count = gl.maximum(last - first, 0)
        none = gl.where(count > 0, 0, 1)
        _prefetch(scales + (tile * chunks + near) * _TILE, thread + none, count * (_TILE * 2))
        fetched = gl.minimum(count, _FETCHED) * (GROUP * EACH * 4)
        _prefetch(origin + near * (GROUP * EACH), thread + none, fetched)
    # The weight was there before; activations and sums are what the kernel before this one writes.
    tl.extra.cuda.gdc_wait()
    tiles = gl.allocate_shared_memory(gl.bfloat16, [PHASE * STEPS, TOKENS, 64], SHARED)
    other_tiles = gl.allocate_shared_memory(gl.bfloat16, [PHASE * STEPS, TOKENS, 64], SHARED)
    corrections: gl.constexpr = None
    other_corrections: gl.constexpr = None
    if TINY:
        corrections = gl.allocate_shared_memory(gl.bfloat16, [PHASE, TOKENS, 16], SHARED_SUMS)
        other_corrections = gl.allocate_shared_memory(gl.bfloat16, [PHASE, TOKENS, 16], SHARED_SUMS)
    token = start + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, WIDE))
    held = x + token[:, None] * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE))[None, :]
    token = start + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, NARROW))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, NARROW))
    own_sums = sums + token[:, None] * 16 + column[None, :]
    # Whole blocks of tokens are read, whatever is behind the last one.
    lines = tokens + TOKENS
    # What a nibble is too large by.
    constant = gl.full([_TILE, 16], -8.0, gl.bfloat16, LEFT)
    _copy(tiles, corrections, held, own_sums, lines, first, last, PHASE, STEPS)
    nibbles = placed(words, low_place, high_place, KEPT)
    total = gl.zeros([_TILE, TOKENS], gl.float32, MMA)
    part = gl.zeros([_TILE, TOKENS], gl.float32, MMA)
    state = (total, part, nibbles, factor, queue)
    for begin in range(first, last, 2 * PHASE):
        middle = gl.minimum(begin + PHASE, last)
        end = gl.minimum(begin + 2 * PHASE, last)
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        _copy(other_tiles, other_corrections, held, own_sums, lines, middle, last, PHASE, STEPS)
        state = _phase(
            *(tiles, corrections, constant, begin, middle, last),
            *(base, origin, thread, own, low_place, high_place, state),
            *(KEPT, BITS, GROUP, TOKENS, AHEAD, MMA),
        )
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        _copy(tiles, corrections, held, own_sums, lines, end, last, PHASE, STEPS)
        state = _phase(
            *(other_tiles, other_corrections, constant, middle, end, last),
            *(base, origin, thread, own, low_place, high_place, state),
            *(KEPT, BITS, GROUP, TOKENS, AHEAD, MMA),
        )
    total, part, nibbles, factor, queue = state
    async_copy.wait_group(0)
    barrier()
    if FOLD:
        total = part
    if TINY:
        total *= TINY_TIMES
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
