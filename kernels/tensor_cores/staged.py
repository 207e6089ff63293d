"""Products of up to 64 tokens and an N:16 int4 weight by `wgmma` on Hopper, all through memory.

As `wgmma`, but words and scales, too, are copied into shared memory ahead (`phases`). Loaded into
registers, words that are under way at the end of a turn of the loop must be moved to where the next
turn wants them, and a move waits for its load: each turn took as long as the memory, however early
the load was. A copy takes half an instruction a survivor-lane for it, a load one.

Columns are decoded while the product of those before runs: up to their nibbles, or (EARLY) up to
the operand, which the compiler follows as far as it has registers. With FOLD scales are multiplied
into the weight, by the fused multiply-add that also takes the bias of tiny numbers (`decode`) away:
one rounding more (relative error 2.2e-3 against 1.7e-3), but no product of the activations' sums
and no second sum, so that at 64 tokens three programs have room where two had.

With EVEN programs share all tiles evenly (`stream_k`), as many as run at once, so that none is left
for a second turn; else a tile is split, as `wgmma` does it, which stacks of experts need.

Shuffles pass through shared memory's pipe, which is busy with activations where there are many
tokens: there MASKED slots of survivors take one shuffle instead of two (`decode.placed`).

What FOLD gives up: scales of 2^17 or more overflow.
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
from .grouping import share_of
from .phases import after, copy_phase, place_of, scales_of, unknown, words_at_step
from .stream_k import meet_neighbours, pieces, share
from .wgmma import FOURS, factors_of, left_of, quarters

_TILE = gl.constexpr(TILE)
FOLD_TIMES = gl.constexpr(2.0**23)
"""What is missing in sums of weights that `_scaled` made."""

# Of four bfloat16 scales: times 2^110, 2^106 (for nibbles that are 16 times too large) and -2^-20
# (their bias), each twice in a register.
_SCALES = gl.constexpr(
    "{ .reg .b32 low, high, both, even, odd, bias; mov.b64 {low, high}, $12;"
    "mov.b32 even, 0x76807680; mov.b32 odd, 0x74807480; mov.b32 bias, 0xB580B580;"
    + "".join(
        f"prmt.b32 both, {word}, 0, {pick:#x}; mul.rn.bf16x2 ${3 * row}, both, even;"
        f"mul.rn.bf16x2 ${3 * row + 1}, both, odd; mul.rn.bf16x2 ${3 * row + 2}, both, bias;"
        for row, (word, pick) in enumerate(
            (("low", 0x1010), ("low", 0x3232), ("high", 0x1010), ("high", 0x3232))
        )
    )
    + "}"
)
_SCALES_REGISTERS = gl.constexpr(",".join(["=&r"] * 12 + ["l"]))
# The pairs of bfloat16 of the nibbles of $4, times scales: $12 and $20, plus the bias $28.
_SCALED = gl.constexpr(
    "{ .reg .b32 upper, part; shr.u32 upper, $4, 8;"
    + "".join(
        f"lop3.b32 part, {word}, {0xF000F << 4 * odd:#x}, {0x80008 << 4 * odd:#x}, 0x6A;"
        f"fma.rn.bf16x2 ${2 * half + odd}, part, ${12 + 8 * odd}, $28;"
        for half, word in enumerate(("$4", "upper"))
        for odd in range(2)
    )
    + "}"
)
_SCALED_REGISTERS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 32))


@gluon.jit
def _rows(row0, row1, row2, row3, like):
    """int32 [32, 4, half, row, row] of what holds for each half of the rows of a word."""
    none = gl.zeros_like(like)
    row0, row1 = row0[:, None] + none, row1[:, None] + none
    row2, row3 = row2[:, None] + none, row3[:, None] + none
    even = gl.join(gl.join(row0, row0), gl.join(row2, row2))
    odd = gl.join(gl.join(row1, row1), gl.join(row3, row3))
    return gl.join(even, odd)


@gluon.jit
def _eight(values):
    """Eight copies of each in the same register."""
    values = gl.join(values, values)
    values = gl.join(values, values)
    return gl.join(values, values)


@gluon.jit
def _scaled(nibbles, four, like):
    """As `widened`, times the scales of each word's four rows, over FOLD_TIMES."""
    e0, o0, b0, e1, o1, b1, e2, o2, b2, e3, o3, b3 = gl.inline_asm_elementwise(
        _SCALES,
        _SCALES_REGISTERS,
        [four],
        dtype=(gl.int32,) * 12,
        is_pure=True,
        pack=1,
    )
    even, odd = _rows(e0, e1, e2, e3, like), _rows(o0, o1, o2, o3, like)
    bias = _rows(b0, b1, b2, b3, like)
    wide = gl.inline_asm_elementwise(
        _SCALED,
        _SCALED_REGISTERS,
        [_eight(nibbles), _eight(even), _eight(odd), _eight(bias)],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=8,
    )
    return gl.reshape(wide, [4, 8, 4, 2, 2, 2, 2, 2, 2])


@gluon.jit
def _operand(nibbles, four, like, KEPT: gl.constexpr, FOLD: gl.constexpr, LEFT: gl.constexpr):
    if FOLD:
        ROWS: gl.constexpr = gl.SliceLayout(1, like.type.layout)
        four = gl.convert_layout(four, ROWS, assert_trivial=True)
        wide = _scaled(nibbles, four, like)
    else:
        wide = widened(nibbles, KEPT, 4, True)
    return left_of(wide, LEFT)


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
    FOLD: gl.constexpr,
    EARLY: gl.constexpr,
    MASKED: gl.constexpr,
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
                nibbles = placed(words, low_place, high_place, KEPT, MASKED)
                if EARLY:
                    following = _operand(nibbles, four, words[0], KEPT, FOLD, LEFT)
                    _pinned()
                    part, _, left = warpgroup_mma_wait(0, deps=(running, left, following))
                else:
                    _pinned()
                    part, _, nibbles = warpgroup_mma_wait(0, deps=(running, left, nibbles))
                    left = _operand(nibbles, four, words[0], KEPT, FOLD, LEFT)
                if step == 0:
                    if not FOLD:
                        total += part * factors_of(before, gl.SliceLayout(1, MMA))[:, None]
                    before = four
                    if chunk == begin:
                        # Nobody reads the other place any more.
                        barrier()
                        copy_phase(
                            *(place, (side + SIDES - 1) % SIDES, codes, scales, x, sums, lines),
                            *(unknown(ahead), inside, chunks, last, KEPT, GROUP, FOLD),
                        )
                right = place[0].index(number * STEPS + step).permute((1, 0))
                running = warpgroup_mma(left, right, part, use_acc=FOLD or step > 0, is_async=True)
                if step == 0 and not FOLD:
                    correction = place[3].index(number).permute((1, 0))
                    running = warpgroup_mma(constant, correction, running, is_async=True)
        side = (side + 1) % SIDES
        ahead, inside = after(ahead, inside, chunks, last, PHASE)
    part, _ = warpgroup_mma_wait(0, deps=(running, left))
    if FOLD:
        total = part * FOLD_TIMES
    else:
        total += part * factors_of(before, gl.SliceLayout(1, MMA))[:, None]
        total *= TINY_TIMES
    return total, side, ahead, inside


@gluon.jit
def tile_staged(
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
    tiles,
    epilogue,
    grouped,
    scale,
    KEPT: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    PHASE: gl.constexpr,
    SIDES: gl.constexpr,
    FOLD: gl.constexpr,
    EARLY: gl.constexpr,
    MASKED: gl.constexpr,
    EVEN: gl.constexpr,
    WORDS: gl.constexpr,
):
    gl.static_assert(BITS == 4 and KEPT < 16)
    tl.extra.cuda.gdc_launch_dependents()
    if grouped > 0:
        tl.extra.cuda.gdc_wait()
    chunks = columns // GROUP
    if EVEN:
        begins = gl.program_id(0) * TOKENS
        ends = tokens
        first, last = share(gl.program_id(1), gl.num_programs(1), tiles * chunks)
    else:
        expert, begins, ends = share_of(blocks, tokens, grouped, TOKENS)
        each = gl.cdiv(chunks, gl.num_programs(2))
        own = gl.program_id(2) * each
        origin = (expert * tiles + gl.program_id(1)) * chunks
        first = origin + gl.minimum(own, chunks)
        last = gl.where(begins < ends, origin + gl.minimum(own + each, chunks), first)
    codes = codes.to(gl.pointer_type(gl.int32), bitcast=True)
    scales = scales.to(gl.pointer_type(gl.int64), bitcast=True)
    place = place_of(KEPT, GROUP, TOKENS, PHASE, SIDES, FOLD)
    x += begins * 64
    sums += begins * 16
    # Whole blocks of tokens are read, whatever is behind the last one.
    lines = tokens + TOKENS
    # The weight was there before; activations and sums are what the kernel before this one writes.
    ahead, inside = first, first % chunks
    for side in gl.static_range(SIDES - 1):
        copy_phase(
            *(place, side, codes, scales, x, sums, lines, ahead, inside, chunks, last),
            *(KEPT, GROUP, FOLD, 1),
        )
        ahead, inside = after(ahead, inside, chunks, last, PHASE)
    tl.extra.cuda.gdc_wait()
    ahead, inside = first, first % chunks
    for side in gl.static_range(SIDES - 1):
        copy_phase(
            *(place, side, codes, scales, x, sums, lines, ahead, inside, chunks, last),
            *(KEPT, GROUP, FOLD, 2),
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
                *(KEPT, GROUP, TOKENS, PHASE, SIDES, FOLD, EARLY, MASKED, WORDS),
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
            *(KEPT, GROUP, TOKENS, PHASE, SIDES, FOLD, EARLY, MASKED, WORDS),
        )
        async_copy.wait_group(0)
        barrier()
        _meet(
            *(y, total, residual, epilogue, scale, partials, counters, begins, ends, rows),
            *(TOKENS, FOLD),
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
    ends,
    rows,
    TOKENS: gl.constexpr,
    FOLD: gl.constexpr,
):
    """Adds up what programs have of a tile, and stores it."""
    MMA: gl.constexpr = total.type.layout
    # Row r of the sums: lane r % 8, the lower bit of which of its rows, the warp, the higher bit.
    r = gl.arange(0, _TILE, layout=gl.SliceLayout(1, MMA))
    row = ((r // 16 % 4 * 8 + r % 8) * 4 + r // 64 * 2 + r // 8 % 2)[:, None]
    number = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))[None, :]
    if FOLD:
        totals = quarters(total)
        numbers = quarters(number + gl.zeros_like(total).to(gl.int32))
        row = quarters(row + gl.zeros_like(total).to(gl.int32))[0]
    else:
        totals = (total,)
        numbers = (number,)
    COUNT: gl.constexpr = 4 if FOLD else 1
    tokens_of = ()
    flats = ()
    for i in gl.static_range(COUNT):
        tokens_of = tokens_of + (begins + numbers[i],)
        flats = flats + (row * TOKENS + numbers[i],)
    meet_distributed(
        y,
        totals,
        residual,
        epilogue,
        scale,
        partials,
        counters,
        ends,
        rows,
        gl.program_id(1) * _TILE + row,
        tokens_of,
        flats,
        ((8, 2, 8, TOKENS // COUNT), (0, 2, 3, 1)),
        COUNT,
    )
