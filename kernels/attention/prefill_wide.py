"""Prefill attention for heads of 512 numbers on Hopper, by `wgmma`; see `prefill`.

Sums of 128 queries and 512 columns are all the registers that a processor has; for fewer queries
the L2 cache could not give keys and values fast enough. So a program goes over its keys twice: once
for scores and half of the output's columns, and once for the other half, with the probabilities
that it wrote down the first time. No product is computed twice. For 128 queries and 64 keys (16.8
million operations, 4,096 cycles of the tensor cores) the first time moves 64 KiB of keys, 32 of
values and 16 of probabilities, the second time 32 and 16.

That is done for `span` keys, then for the next ones: the half whose sums are in registers goes on,
the other one waits in scratch memory. Maxima are rounded up to whole numbers (they are exponents of
2), so that probabilities under the maximum of their step are brought under the last one exactly.

The first time, keys have four parts of shared memory and values two. A part is filled for the next
step as soon as its product is over; exponents are computed while the values of the step before are
multiplied. The second time, values of three steps have two parts each. A program stays for many
tiles, as its scratch memory does.

Probabilities are rounded to bfloat16. It gave up windows, and keys that a mask of its own tells.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launching.launch import Kernel, Variant
from ..launching.targets import HOPPER, Target, processors_of
from ..workspace import barrier
from .wide_parts import (
    BLOCK,
    COPY,
    DIM,
    HALF,
    PAIRS,
    PART,
    ROWS,
    SCORES,
    SHARED,
    SUMS,
    TILE,
    copy_key,
    copy_values,
    keys_from,
    left_of,
    multiply,
    own_place,
    pairs_under,
    parts_at,
    places_of,
    put_pairs,
    put_sums,
    softmax,
    sums_at,
    zero_of,
)
from .wide_scratch import FEW, PAIRS_A_STEP, Scratch

WARPS = 8
_PAIRS_A_STEP = gl.constexpr(PAIRS_A_STEP)


@gluon.jit
def _score_pass(
    held,
    held_queries,
    totals,
    largest,
    share,
    key,
    value,
    shares,
    marks,
    begin,
    steps,
    last,
    whole,
):
    """Scores of some steps from key `begin` on, and the sums of half the columns.

    Writes probabilities and their maxima. The mask is needed by steps that end behind key `whole`.
    """
    row = gl.arange(0, BLOCK, layout=ROWS)
    places = keys_from(key, begin, last)
    parts = parts_at(held, 0)
    for j in gl.static_range(4):
        copy_key(parts, j, places)
    # In place of values of a step before the first; its probabilities are 0.
    async_copy.commit_group()
    weights = gl.zeros([BLOCK, TILE // 2], gl.int32, PAIRS)
    for step in range(steps):
        first = begin + step * TILE
        zero = zero_of(step)
        parts = parts_at(held, zero)
        queries = parts_at(held_queries, zero)
        places = keys_from(key, first + TILE, last)
        scores = gl.zeros([BLOCK, TILE], gl.float32, SCORES)
        for j in gl.static_range(4):
            # All but as many of the latest copies are there. Behind the barrier, all threads have
            # waited for the product before the last: its part is free.
            async_copy.wait_group(4 - j if j < 2 else 2)
            if j >= 2:
                scores = warpgroup_mma_wait(1, deps=(scores,))
            fence_async_shared()
            barrier()
            if j >= 2:
                copy_key(parts, j - 2, places)
            right = parts[j].permute((1, 0))
            scores = warpgroup_mma(queries[j], right, scores, use_acc=j > 0, is_async=True)
        async_copy.wait_group(2)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        fence_async_shared()
        barrier()
        copy_key(parts, 2, places)
        left = left_of(weights)
        running = multiply(left, parts[4], parts[5], totals)
        scores = warpgroup_mma_wait(2, deps=(scores,))
        barrier()
        copy_key(parts, 3, places)
        # In both branches: behind them the assembler would put exponents after the wait.
        if first + TILE > whole:
            weights, largest, share, old = softmax(scores, largest, share, whole - 1, first, True)
        else:
            weights, largest, share, old = softmax(scores, largest, share, whole - 1, first, False)
        put_pairs(shares + step * _PAIRS_A_STEP, weights)
        gl.store(marks + step * BLOCK + row, largest)
        low, high, _ = warpgroup_mma_wait(0, deps=running + (left,))
        low *= old[:, None]
        high *= old[:, None]
        totals = (low, high)
        barrier()
        copy_values(parts, 4, keys_from(value, first, last))
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    left = left_of(weights)
    running = multiply(left, parts[4], parts[5], totals)
    low, high, _ = warpgroup_mma_wait(0, deps=running + (left,))
    barrier()
    return (low, high), largest, share


@gluon.jit
def _value_pass(held, totals, largest, value, shares, marks, begin, steps, last):
    """The sums of the other columns of the same steps, by the probabilities that were written.

    Two steps' products are under way.
    """
    row = gl.arange(0, BLOCK, layout=ROWS)
    parts = parts_at(held, 0)
    for early in gl.static_range(2):
        copy_values(parts, 2 * early, keys_from(value, begin + early * TILE, last))
    found = gl.load(own_place(shares, 4))
    weights = pairs_under(found, gl.exp2(gl.load(marks + row) - largest))
    ahead = gl.minimum(1, steps - 1)
    found = gl.load(own_place(shares + ahead * _PAIRS_A_STEP, 4))
    mark = gl.load(marks + ahead * BLOCK + row)
    former = left_of(weights)
    for turn in range(0, steps, 3):
        parts = parts_at(held, zero_of(turn))
        for i in gl.static_range(3):
            # Up to two steps too many, with probabilities of 0.
            step = turn + i
            async_copy.wait_group(1)
            fence_async_shared()
            barrier()
            left = left_of(weights)
            running = multiply(left, parts[2 * i], parts[2 * i + 1], totals)
            low, high, _ = warpgroup_mma_wait(2, deps=running + (former,))
            totals = (low, high)
            former = left
            barrier()
            # All threads have waited for the product before, whose parts these are.
            places = keys_from(value, begin + (step + 2) * TILE, last)
            copy_values(parts, (2 * i + 4) % 6, places)
            factor = gl.where(step + 1 < steps, gl.exp2(mark - largest), 0.0)
            weights = pairs_under(found, factor)
            ahead = gl.minimum(step + 2, steps - 1)
            found = gl.load(own_place(shares + ahead * _PAIRS_A_STEP, 4))
            mark = gl.load(marks + ahead * BLOCK + row)
    low, high, _ = warpgroup_mma_wait(0, deps=totals + (former,))
    totals = (low, high)
    async_copy.wait_group(0)
    barrier()
    return totals


@gluon.jit
def _tile_of(tile, queries, heads):
    """First query, head, how many queries, and where they begin; the last queries come first."""
    start = (gl.cdiv(queries, BLOCK) - 1 - tile // heads) * BLOCK
    head = tile % heads
    line = (start.to(gl.int64) * heads + head) * DIM
    return start, head, gl.minimum(BLOCK, queries - start), line


@gluon.jit
def _prefill_wide(
    out,
    query,
    key,
    value,
    shares,
    marks,
    sums,
    queries,
    keys,
    heads,
    group,
    offset,
    span,
):
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    shares += program.to(gl.int64) * (span // TILE * _PAIRS_A_STEP)
    marks += program * (span // TILE * BLOCK)
    sums += program * (BLOCK * DIM)
    # Each has memory of its own: between copies into slices of one a barrier would be put.
    asked = ()
    for _ in gl.static_range(4):
        asked += (gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK, PART], SHARED),)
    held = ()
    for _ in gl.static_range(6):
        held += (gl.allocate_shared_memory(gl.bfloat16, [1, TILE, PART], SHARED),)
    # What is multiplied by 0 has to be a number.
    parts = parts_at(held, 0)
    parts[4].store(gl.zeros([TILE, PART], gl.bfloat16, COPY))
    parts[5].store(gl.zeros([TILE, PART], gl.bfloat16, COPY))
    row = gl.arange(0, BLOCK, layout=ROWS)
    column = gl.arange(0, PART, layout=gl.SliceLayout(0, SUMS))
    tiles = gl.cdiv(queries, BLOCK) * heads
    place = program
    for first in range(0, tiles, programs):
        # Tiles with most keys come first. Every other time the order of programs is turned, so
        # that all have about as many keys.
        tile = first + place
        place = programs - 1 - place
        if tile < tiles:
            start, head, count, line = _tile_of(tile, queries, heads)
            last = offset + start + count
            own = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, COPY))
            places = places_of(query + line, gl.minimum(own, count - 1) * (heads * DIM))
            for j in gl.static_range(4):
                async_copy.async_copy_global_to_shared(asked[j].index(0), places + j * PART)
            async_copy.commit_group()
            plane = (head // group).to(gl.int64) * keys * DIM
            largest = gl.full([BLOCK], -float("inf"), gl.float32, ROWS)
            share = gl.zeros([BLOCK], gl.float32, ROWS)
            none = gl.zeros([BLOCK, PART], gl.float32, SUMS)
            totals = (none, none)
            # Where the columns begin whose sums are in registers.
            side = 0
            for begin in range(0, last, span):
                steps = gl.cdiv(gl.minimum(last - begin, span), TILE)
                before = largest
                totals, largest, share = _score_pass(
                    *(held, asked, totals, largest, share, key + plane, value + plane + side),
                    *(shares, marks, begin, steps, last, offset + start + 1),
                )
                mine = own_place(sums + side * BLOCK, 16)
                put_sums(mine, totals[0])
                put_sums(mine + BLOCK * PART, totals[1])
                side = HALF - side
                theirs = own_place(sums + side * BLOCK, 16)
                old = gl.exp2(before - largest)[:, None]
                low = sums_at(theirs, begin > 0) * old
                high = sums_at(theirs + BLOCK * PART, begin > 0) * old
                totals = _value_pass(
                    *(held, (low, high), largest, value + plane + side),
                    *(shares, marks, begin, steps, last),
                )
            # Once more, rather than kept in registers all the time.
            start, head, count, line = _tile_of(tile + zero_of(first), queries, heads)
            target = out + line + row[:, None] * (heads * DIM) + column[None, :]
            inside = (row < count)[:, None] & (column >= 0)[None, :]
            factor = (1.0 / share)[:, None]
            other = HALF - side
            theirs = own_place(sums + other * BLOCK, 16)
            for i in gl.static_range(2):
                mean = (totals[i] * factor).to(gl.bfloat16)
                gl.store(target + side + i * PART, mean, mask=inside)
                mean = (sums_at(theirs + i * (BLOCK * PART), other >= 0) * factor).to(gl.bfloat16)
                gl.store(target + other + i * PART, mean, mask=inside)


_kernel = Kernel(_prefill_wide, grid="programs")


def variants() -> Iterator[Variant]:
    """What the bundle holds."""
    types = (*["*bf16"] * 4, "*i32", *["*fp32"] * 2, *["i32"] * 6)
    yield Variant(_kernel, types, {}, WARPS, 1, HOPPER)


def takes(query: Tensor, keys: int, window: int | None, target: Target | None) -> bool:
    """Whether this program attends so; `keys` are all that the last query could see.

    It does not if keys or heads are so many that places among them need more than 32 bits.
    """
    _, heads, dim = query.shape
    return (
        (target is not None and target.is_hopper)
        and (query.dtype == torch.bfloat16 and dim == DIM.value)
        and (len(query) >= FEW and (window is None or window >= keys))
        and max(keys, BLOCK.value * heads) * dim <= 1 << 31
    )


def prefill_wide(query: Tensor, key: Tensor, value: Tensor, offset: int, out: Tensor) -> None:
    """`prefill.prefill` of what `takes` says; `Scratch` is what it takes of memory.

    Args:
        query: bfloat16 [L, heads, 512], contiguous, as all of them.
        key, value: bfloat16 [kv_heads, S, 512].
        offset: the first query's own key.
        out: like `query`; written.
    """
    queries, heads, _ = query.shape
    scratch = Scratch.of(queries, heads, offset + queries, processors_of(query.device))
    _kernel.launch(
        (scratch.programs,),
        *(out, query, key, value, *_made(scratch, query.device)),
        *(queries, key.shape[1], heads, heads // key.shape[0], offset, scratch.span),
        warps=WARPS,
        stages=1,
    )


def _made(scratch: Scratch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (pairs of bfloat16), maxima and sums."""
    return (
        torch.empty(scratch.pairs, dtype=torch.int32, device=device),
        torch.empty(scratch.marks, dtype=torch.float32, device=device),
        torch.empty(scratch.sums, dtype=torch.float32, device=device),
    )
