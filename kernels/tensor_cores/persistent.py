"""Products of up to 256 tokens a program and a packed weight by `wgmma`, on Hopper.

One program a processor, of two warpgroups with 64 rows and all tokens each: so a weight is decoded
once for up to 256 tokens, into registers, as wgmma's left operand. (Decoded into shared memory it
would be written and read there: with the activations that is more than shared memory can do while
the tensor cores are busy.) Two products are under way: while one runs, the next columns are
decoded. (An operand in registers must stay until its product has ended. That a product is waited
for before the second next operand is made takes two steps a turn of the loop, which groups of 64
columns do not have: they wait for each product, once the next operand is made; DEEP is false.)
Programs share the tiles evenly (`stream_k`), and fetch ahead from tile to tile. There is
no room for a second sum, so that scales are multiplied into the bfloat16 weight: relative error
2.2e-3 against 1.7e-3.
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

from ..formats import TILE
from ..workspace import barrier
from .row_pairs import codes_at, codes_of, elements_a_step, operand_of, row_of
from .stream_k import meet_neighbours, pieces, share

_TILE = gl.constexpr(TILE)
_STAGES = gl.constexpr(4)
"""Of activations, 64 columns each: of the product before, the present one, and two under way."""


@gluon.constexpr_function
def widths(tokens):
    """Powers of two that make up a program's tokens, the largest first."""
    return tuple(1 << bit for bit in (8, 7, 6) if tokens >> bit & 1)


@gluon.constexpr_function
def sums_layout(width):
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, width, 16]
    )


@gluon.jit
def _offsets(FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Of the activations of 64 columns and tokens FIRST to FIRST + WIDTH - 1, 16 bytes a thread."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    token = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, WIDE))
    return token[:, None] * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE))[None, :]


@gluon.jit
def _copy(buffers, slot, source, WIDTHS: gl.constexpr):
    """Starts to copy the activations of 64 columns, which lie together, into a stage."""
    async_copy.async_copy_global_to_shared(buffers[0].index(slot), source + _offsets(0, WIDTHS[0]))
    if len(WIDTHS) > 1:
        async_copy.async_copy_global_to_shared(
            buffers[1].index(slot), source + _offsets(WIDTHS[0], WIDTHS[1])
        )
    async_copy.commit_group()


@gluon.jit
def _stages(COUNT: gl.constexpr, WIDTH: gl.constexpr):
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return gl.allocate_shared_memory(gl.bfloat16, [COUNT, WIDTH, 64], SHARED)


@gluon.jit
def _zeros(WIDTH: gl.constexpr):
    LAYOUT: gl.constexpr = sums_layout(WIDTH)
    return gl.zeros([_TILE, WIDTH], gl.float32, LAYOUT)


@gluon.jit
def _queue(base, step, final, AHEAD: gl.constexpr, EACH: gl.constexpr, KEPT: gl.constexpr):
    """The codes of the next steps, no further than the final one."""
    queue = ()
    for i in gl.static_range(AHEAD):
        queue += (codes_of(base + gl.minimum(step + i, final) * EACH, KEPT),)
    return queue


@gluon.jit
def tile_persistent(
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
    tiles,
    epilogue,
    scale,
    KEPT: gl.constexpr,
    BITS: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    AHEAD: gl.constexpr,
    WORDS: gl.constexpr,
):
    WIDTHS: gl.constexpr = widths(TOKENS)
    MMA: gl.constexpr = sums_layout(WIDTHS[0])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    EACH: gl.constexpr = elements_a_step(KEPT, BITS)
    STEPS: gl.constexpr = GROUP // 64
    DEEP: gl.constexpr = STEPS > 1
    block = gl.program_id(0)
    program = gl.program_id(1)
    programs = gl.num_programs(1)
    chunks = columns // GROUP
    first, last = share(program, programs, tiles * chunks)
    x += block * (columns * TOKENS)
    # What this reads was written, and what it writes was read, by kernels that have ended.
    tl.extra.cuda.gdc_wait()
    base = codes_at(codes, KEPT, BITS, WORDS)
    own = scales + row_of(gl.arange(0, _TILE, layout=gl.SliceLayout(1, MMA)))
    buffers = ()
    sums = ()
    for i in gl.static_range(len(WIDTHS)):
        buffers = buffers + (_stages(_STAGES, WIDTHS[i]),)
        sums = sums + (_zeros(WIDTHS[i]),)
    # The next step of the activations to be copied, in its tile: what is one too many is not read.
    ahead = first % chunks * STEPS
    for stage in gl.static_range(_STAGES - 2):
        _copy(buffers, stage, x + ahead * (TOKENS * 64), WIDTHS)
        ahead = gl.where(ahead + 1 == chunks * STEPS, 0, ahead + 1)
    final = last * STEPS - 1
    words = codes_of(base + first * STEPS * EACH, KEPT)
    queue = _queue(base, first * STEPS + 1, final, AHEAD, EACH, KEPT)
    factor = gl.load(own + first * _TILE)
    later = gl.load(own + gl.minimum(first + 1, last - 1) * _TILE)
    left = operand_of(words, factor, KEPT, BITS, LEFT)
    before = left
    slot = 0
    start = first
    while start < last:
        tile = start // chunks
        stop = gl.minimum((tile + 1) * chunks, last)
        for chunk in range(start, stop):
            beyond = gl.load(own + gl.minimum(chunk + 2, last - 1) * _TILE)
            for step in gl.static_range(STEPS):
                # All but the latest copies are there. Behind the barrier, all threads have waited
                # for the product before the last: its activations' place is free.
                async_copy.wait_group(_STAGES - 3)
                fence_async_shared()
                barrier()
                _copy(buffers, (slot + _STAGES - 2) % _STAGES, x + ahead * (TOKENS * 64), WIDTHS)
                ahead = gl.where(ahead + 1 == chunks * STEPS, 0, ahead + 1)
                words = queue[0]
                at = gl.minimum(chunk * STEPS + (step + 1 + AHEAD), final)
                queue = queue[1:] + (codes_of(base + at * EACH, KEPT),)
                running = ()
                for i in gl.static_range(len(WIDTHS)):
                    running += (
                        warpgroup_mma(
                            left,
                            buffers[i].index(slot).permute((1, 0)),
                            sums[i],
                            use_acc=(chunk > start) | (step > 0),
                            is_async=True,
                        ),
                    )
                following = later if step + 1 == STEPS else factor
                if not DEEP:
                    next_left = operand_of(words, following, KEPT, BITS, LEFT)
                waited = warpgroup_mma_wait(len(WIDTHS) if DEEP else 0, deps=running + (before,))
                sums = waited[: len(WIDTHS)]
                if DEEP:
                    next_left = operand_of(words, following, KEPT, BITS, LEFT)
                before = left
                left = next_left
                slot = (slot + 1) % _STAGES
            factor = later
            later = beyond
        sums = warpgroup_mma_wait(0, deps=sums + (before,))[: len(WIDTHS)]
        totals = pieces(sums[0])
        if len(WIDTHS) > 1:
            totals = totals + pieces(sums[1])
        meet_neighbours(
            y,
            totals,
            residual,
            epilogue,
            scale,
            partials + block * programs * (2 * _TILE * TOKENS),
            counters + block * tiles + tile,
            program,
            programs,
            tile * chunks,
            (tile + 1) * chunks,
            tiles * chunks,
            tokens,
            rows,
            tile * _TILE,
            block * TOKENS,
            TOKENS,
        )
        start = stop
    async_copy.wait_group(0)
