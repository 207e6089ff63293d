"""The program of decode attention over narrow pages in 8 bits, by `mma` on NVIDIA's cards.

A step takes TILE rows (`rows`), which pass through shared memory as they are stored, the next
step's under way while this one's are used: nothing is widened before the tensor cores want it.
Scores are products of rows and the two digits of up to eight query heads in int8, which are read
from shared memory again each step; values are multiplied by two digits of probabilities
(`products`). Each warp has a fourth of the rows, then a fourth of the columns, so that only
scores' maxima and probabilities go from warp to warp. Registers and shared memory are kept so few
that three programs run on a Hopper processor: what limits them is how long each waits.

It gave up more than eight query heads a key head, digits of 4 bits, and heads that RoPE turns in
fewer than 64 columns; `..decode_tiles` has these. `..decode` tells what is computed.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ...launching.launch import Kernel
from ...workspace import barrier
from ..decode_tiles import LIFT, TINY, share_of
from ..splits import DIGIT
from .layouts import (
    BYTES,
    BYTES_ON_SIDE,
    COLUMNS,
    COPIED,
    COPY,
    COUPLES,
    HEAD,
    HEADS,
    MMA,
    ON_SIDE,
    PART,
    PLAIN,
    PLAIN_ROWS,
    ROW,
    WARPS,
)
from .products import (
    keys_apart,
    mixed,
    of_both_digits,
    scores_of,
    signs_of_hadamard,
    two_digits,
)
from .rows import LISTED, about_rows, copy_codes, index_of, key_of, list_wide, page_of


@gluon.jit
def _decode_mma(
    sums,
    marks,
    lists,
    digits,
    own,
    factors,
    codes,
    scales,
    second,
    more_codes,
    more_scales,
    tables,
    offsets,
    weight,
    turns,
    columns,
    kv_heads,
    group,
    window,
    DIM: gl.constexpr,
    SIDES: gl.constexpr,
    PAIRS: gl.constexpr,
    CHUNK: gl.constexpr,
    PAGE: gl.constexpr,
    TILE: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: gl.constexpr = (DIM - 2 * PAIRS) // CHUNK
    batch = gl.program_id(0) // kv_heads
    kv_head = gl.program_id(0) % kv_heads
    split = gl.program_id(1)
    head = (gl.program_id(0) * group).to(gl.int64)
    offset = gl.load(offsets + batch).to(gl.int32)
    begin, end, low = share_of(offset, window, TILE)
    tables += batch.to(gl.int64) * columns

    found = lists + (gl.program_id(0) * gl.num_programs(1) + split).to(gl.int64) * LISTED
    first = begin * TILE
    from_ = gl.maximum(first, low)
    until = gl.minimum(end * TILE, offset + 1)
    count = list_wide(found, tables, second, from_, until, kv_heads, kv_head, PAGE)
    whole = end - begin
    if count > LISTED:
        first = from_
        count = until - from_
        whole = 0
    steps = whole + gl.cdiv(count, TILE // 2)
    barrier()

    buffers = ()
    for _ in gl.static_range(DIM // COLUMNS):
        buffer = gl.allocate_shared_memory(gl.int8, [2 * SIDES, TILE, COLUMNS], BYTES)
        buffers = buffers + (buffer,)
    shares = gl.allocate_shared_memory(gl.int8, [TILE, 2 * HEADS], BYTES_ON_SIDE)
    maxima = gl.allocate_shared_memory(gl.float32, [WARPS, HEADS], PLAIN_ROWS)
    copied = gl.arange(0, TILE, layout=COPIED)
    row = gl.arange(0, TILE, layout=ROW)

    # Pages of a step are looked up in the one before; its codes are under way then.
    key = key_of(0, copied, found, first, whole, count, low, offset, TILE)
    page = page_of(tables, key, PAGE)
    copy_codes(
        *(buffers, 0, codes, more_codes, second, page, key, copied, whole == 0, steps > 0),
        *(kv_heads, kv_head, DIM, SIDES, PAGE),
    )
    if OVERLAP:
        # `turn_query` runs till here at most: what was before it is over, or it would not run.
        tl.extra.cuda.gdc_wait()
    # The query, in shared memory: a row for each digit of each head.
    asked = gl.allocate_shared_memory(gl.int8, [CHUNKS, 2 * HEADS, CHUNK], BYTES)
    byte = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, COPY))
    asked_row = gl.arange(0, 2 * HEADS, layout=COPIED)
    place = digits + ((head + asked_row % HEADS) * 2 + asked_row // HEADS)[:, None] * DIM
    place += byte[None, :]
    here = (asked_row % HEADS < group)[:, None] & (byte >= 0)[None, :]
    for i in gl.static_range(CHUNKS):
        asked.index(i).store(gl.load(place + (2 * PAIRS + i * CHUNK), mask=here, other=0))
    h = gl.arange(0, HEADS, layout=HEAD)
    rates = (gl.load(factors + (head + h) * 2, mask=h < group, other=0.0),)
    mine = 0
    weights = 0
    plus = 0
    minus = 0
    if PAIRS > 0:
        rates = rates + (gl.load(factors + (head + h) * 2 + 1, mask=h < group, other=0.0),)
        plus = signs_of_hadamard()
        minus = -plus
        mine = gl.allocate_shared_memory(gl.float16, [2 * PAIRS, HEADS], ON_SIDE)
        weights = gl.allocate_shared_memory(gl.float32, [2 * PAIRS // PART, PART], PLAIN)
        pair = gl.arange(0, PART, layout=ROW)
        column = gl.arange(0, PART, layout=HEAD)
        for i in gl.static_range(2 * PAIRS // PART):
            # Part j of the firsts of pairs, then part j of the seconds.
            start = i % 2 * PAIRS + i // 2 * PART
            place = own + (head + h)[None, :] * (2 * PAIRS) + (start + pair)[:, None]
            part = gl.load(place, mask=(h < group)[None, :], other=0.0)
            mine.slice(i * PART, PART, dim=0).store(part)
            rate = gl.load(weight + i % 2 * (DIM // 2) + i // 2 * PART + column)
            weights.index(i).store(rate * (0.5 / PAIRS))

    key = key_of(1, copied, found, first, whole, count, low, offset, TILE)
    row_key = key_of(0, row, found, first, whole, count, low, offset, TILE)
    page = page_of(tables, key, PAGE)
    row_page = page_of(tables, row_key, PAGE)

    largest = gl.full([HEADS], -float("inf"), gl.float32, HEAD)
    share = gl.zeros([TILE, HEADS], gl.float32, MMA)
    totals = ()
    for _ in gl.static_range(2 * len(buffers)):
        totals = totals + (gl.zeros([COUPLES, HEADS], gl.float32, MMA),)
    for step in range(0, steps):
        row_more, key_scale, value_scale, turn = about_rows(
            *(second, scales, turns, row_page, row_key, kv_heads, kv_head),
            *(SIDES, PAIRS, PAGE),
        )
        async_copy.wait_group(0)
        # Nobody reads any more what the next step's codes are written over.
        barrier()
        slot = step % 2
        going = step + 1 < steps
        copy_codes(
            *(buffers, 1 - slot, codes, more_codes, second, page, key, copied),
            *(step + 1 >= whole, going, kv_heads, kv_head, DIM, SIDES, PAGE),
        )
        scores = scores_of(
            buffers, slot * SIDES, asked, mine, weights, turn, rates, plus, minus, PAIRS
        )
        key_unit = key_scale.to(gl.float32)
        unit = value_scale.to(gl.float32)
        own_key = first + step * TILE + row
        counts = (own_key >= low) & (own_key <= offset) & (row_more < 0)
        once = counts
        if step >= whole:
            is_first = row // 8 % 2 == 0
            counts = index_of(step, row, whole, TILE) < count
            once = counts & is_first
            there = row_more >= 0
            pool = more_scales + gl.maximum(row_more, 0).to(gl.int64) * SIDES
            other = gl.load(pool, mask=there, other=0.0).to(gl.float32)
            key_unit = gl.where(is_first, key_unit, other)
            other = gl.load(pool + (SIDES - 1), mask=there, other=0.0).to(gl.float32)
            unit = gl.where(is_first, unit, other)
        scores *= key_unit[:, None]
        if step >= whole:
            scores = of_both_digits(scores)
        scores = gl.where(counts[:, None], scores, -float("inf"))
        # A value of scale 0 has no codes but 0.
        lifted = scores + gl.log2(gl.maximum(unit, TINY))[:, None]
        # Nothing may have counted in this step, or so far.
        maxima.store(gl.max(gl.reshape(lifted, [WARPS, TILE // WARPS, HEADS]), 1))
        most = maxima.slice(0, 1, dim=0).load(MMA)
        for i in gl.static_range(1, WARPS):
            most = gl.maximum(most, maxima.slice(i, 1, dim=0).load(MMA))
        most = gl.max(most, 0)
        largest_yet = gl.maximum(largest, most)
        base = gl.where(largest_yet == -float("inf"), 0.0, largest_yet)
        old = gl.exp2(largest - base)
        unit_of_step = gl.exp2(most - base + LIFT) * (1 / (127 * DIGIT))
        largest = largest_yet
        share = share * old[None, :] + gl.where(once[:, None], gl.exp2(scores - base[None, :]), 0.0)
        most = gl.where(most == -float("inf"), 0.0, most)
        parts = two_digits(gl.exp2(lifted - most[None, :]))
        shares.store(gl.permute(keys_apart(gl.permute(parts, [1, 0])), [1, 0]))

        key = key_of(step + 2, copied, found, first, whole, count, low, offset, TILE)
        row_key = key_of(step + 1, row, found, first, whole, count, low, offset, TILE)
        page = page_of(tables, key, PAGE)
        row_page = page_of(tables, row_key, PAGE)
        at = slot * SIDES + (SIDES - 1)
        totals = mixed(totals, shares, buffers, at, old, unit_of_step)
    async_copy.wait_group(0)

    place = (head + h) * gl.num_programs(1) + split
    target = sums + place[None, :] * DIM + 2 * gl.arange(0, COUPLES, layout=ROW)[:, None]
    for i in gl.static_range(len(totals)):
        column = i // 2 * COLUMNS + i % 2
        gl.store(target + column, totals[i], mask=(h < group)[None, :])
    gl.store(marks + place * 2, largest, mask=h < group)
    gl.store(marks + place * 2 + 1, gl.sum(share, 0), mask=h < group)


decode_mma = Kernel(_decode_mma, grid="B * kv_heads, splits")
