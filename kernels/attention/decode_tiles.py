"""The programs of decode attention in plain Triton, for processors of every make; see `decode`.

A step takes TILE keys. Keys before the first that is seen and after the last are read as that one,
so that no page is touched which holds none, and no load needs a mask; their scores are -inf.
"""

import triton
import triton.language as tl

from ..launching.launch import Kernel
from ..launching.overlap import wait_in_turn
from .splits import DIGIT, LOG2E, leave, leave_marks, sign

LIFT = tl.constexpr(14.0)
"""Binary places by which probabilities are lifted into the range of float16."""
TINY = tl.constexpr(1e-30)


@triton.jit
def share_of(offset, window, TILE: tl.constexpr):
    """First and last + 1 tile of keys of this program, and the first key seen."""
    low = tl.maximum(offset - window + 1, 0)
    first = low // TILE
    tiles = offset // TILE + 1 - first
    begin = first + tiles * tl.program_id(1) // tl.num_programs(1)
    end = first + tiles * (tl.program_id(1) + 1) // tl.num_programs(1)
    return begin, end, low


@triton.jit
def _columns(table, start: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK columns from `start` on of rows of WIDTH numbers or bytes."""
    column = start + tl.arange(0, CHUNK)
    if WIDTH % CHUNK == 0:
        found = tl.load(table[:, None] + column[None, :])
    else:
        found = tl.load(table[:, None] + column[None, :], column[None, :] < WIDTH, 0)
    return found


@triton.jit
def _codes(place, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """A digit's bytes, CHUNK columns at a time."""
    codes = ()
    for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        codes = codes + (_columns(place, i * CHUNK, WIDTH, CHUNK),)
    return codes


@triton.jit
def _numbers(codes, part: tl.constexpr, BITS: tl.constexpr):
    """int8 of a chunk: its bytes, or sixteen times its low (part 0) or its high nibbles."""
    if BITS == 8:
        numbers = codes
    elif part == 0:
        numbers = codes << 4
    else:
        numbers = codes & -16
    return numbers


@triton.jit
def _signs(row, column, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """int8 [rows, columns] of the Hadamard matrices in the columns that RoPE turns."""
    row = row[:, None]
    column = column[None, :]
    same = (row // BLOCK == column // BLOCK) & (row < 2 * PAIRS)
    return tl.where(same, sign(row % BLOCK, column % BLOCK), 0).to(tl.int8)


@triton.jit
def _scores(
    codes,
    firsts,
    seconds,
    own,
    weights,
    turns,
    factors,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """float32 [ROWS, TILE]: products of queries and keys, but for the keys' scales."""
    ROWS: tl.constexpr = firsts[0].shape[0]
    TILE: tl.constexpr = codes[0].shape[0]
    PARTS: tl.constexpr = 8 // BITS
    one = tl.zeros([ROWS, TILE], tl.int32)
    two = tl.zeros([ROWS, TILE], tl.int32)
    if PAIRS > 0:
        COUNT: tl.constexpr = own[0].shape[1]
        left = tl.zeros([TILE, COUNT], tl.int32)
        right = tl.zeros([TILE, COUNT], tl.int32)
    for i in tl.static_range(len(firsts)):
        x = _numbers(codes[i // PARTS], i % PARTS, BITS)
        if i % PARTS * (DIM // 2) + i // PARTS * CHUNK + CHUNK > 2 * PAIRS:
            one = tl.dot(firsts[i], tl.trans(x), one, out_dtype=tl.int32)
            two = tl.dot(seconds[i], tl.trans(x), two, out_dtype=tl.int32)
        if i % PARTS * (DIM // 2) + i // PARTS * CHUNK < 2 * PAIRS:
            row = i % PARTS * (DIM // 2) + i // PARTS * CHUNK + tl.arange(0, CHUNK)
            column = tl.arange(0, COUNT)
            left = tl.dot(x, _signs(row, column, PAIRS, BLOCK), left, out_dtype=tl.int32)
            column += PAIRS
            right = tl.dot(x, _signs(row, column, PAIRS, BLOCK), right, out_dtype=tl.int32)
    scores = (one.to(tl.float32) + two.to(tl.float32) * (1 / DIGIT)) * factors[0][:, None]
    if PAIRS > 0:
        a = left.to(tl.float32) * weights[0][None, :]
        b = right.to(tl.float32) * weights[1][None, :]
        low = (a * turns[0] - b * turns[1]).to(tl.float16)
        high = (b * turns[0] + a * turns[1]).to(tl.float16)
        turned = tl.dot(own[0], tl.trans(low))
        turned = tl.dot(own[1], tl.trans(high), turned)
        scores += turned * factors[1][:, None]
    return scores


@triton.jit
def _mixed(sums, shares, codes, BITS: tl.constexpr):
    """Adds shares [ROWS, TILE] times codes [TILE, columns] to sums."""
    PARTS: tl.constexpr = 8 // BITS
    new = ()
    for i in tl.static_range(len(sums)):
        x = _numbers(codes[i // PARTS], i % PARTS, BITS)
        new = new + (tl.dot(shares, x.to(tl.float16), sums[i]),)
    return new


@triton.jit
def _decode_narrow(
    sums,
    marks,
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
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    SIDES: tl.constexpr,
    PAIRS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    WIDTH: tl.constexpr = DIM * BITS // 8
    PARTS: tl.constexpr = 8 // BITS
    UNIT: tl.constexpr = 1.0 if BITS == 8 else 0.0625
    batch = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    head = (tl.program_id(0) * group).to(tl.int64)
    offset = tl.load(offsets + batch).to(tl.int32)
    begin, end, low = share_of(offset, window, TILE)
    tables += batch.to(tl.int64) * columns

    row = tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    inside = (row < group)[:, None]
    firsts = ()
    seconds = ()
    totals = ()
    for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK * PARTS):
        byte = i // PARTS * CHUNK + column
        place = digits + (head + row)[:, None] * (2 * DIM) + (i % PARTS * (DIM // 2) + byte)[None]
        here = inside & (byte < WIDTH)[None, :]
        firsts = firsts + (tl.load(place, mask=here, other=0),)
        seconds = seconds + (tl.load(place + DIM, mask=here, other=0),)
        totals = totals + (tl.zeros([ROWS, CHUNK], tl.float32),)
    each = tl.load(factors + (head + row) * 2, mask=row < group, other=0.0) * UNIT
    rates = (each,)
    mine = ()
    weights = ()
    if PAIRS > 0:
        each = tl.load(factors + (head + row) * 2 + 1, mask=row < group, other=0.0)
        rates = rates + (each,)
        pair = tl.arange(0, COUNT)
        for side in tl.static_range(2):
            here = inside & (pair < PAIRS)[None, :]
            number = own + (head + row)[:, None] * (2 * PAIRS) + (side * PAIRS + pair)[None, :]
            mine = mine + (tl.load(number, mask=here, other=0.0),)
            rate = tl.load(weight + side * (DIM // 2) + pair, mask=pair < PAIRS, other=0.0)
            weights = weights + (rate * (UNIT / BLOCK),)

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    for tile in range(begin, end):
        key = tile * TILE + tl.arange(0, TILE)
        seen = (key >= low) & (key <= offset)
        key = tl.minimum(tl.maximum(key, low), offset)
        page = tl.load(tables + key // PAGE).to(tl.int64)
        line = (page * kv_heads + kv_head) * PAGE + key % PAGE
        line_key = (page * (SIDES * kv_heads) + kv_head) * PAGE + key % PAGE
        line_value = line_key + (SIDES - 1) * kv_heads * PAGE
        more = tl.load(second + line)
        key_codes = _codes(codes + line_key * WIDTH, WIDTH, CHUNK)
        key_scale = tl.load(scales + line_key).to(tl.float32)
        value_scale = key_scale
        value_codes = key_codes
        if SIDES == 2:
            value_codes = _codes(codes + line_value * WIDTH, WIDTH, CHUNK)
            value_scale = tl.load(scales + line_value).to(tl.float32)
        turn = ()
        if PAIRS > 0:
            angles = turns + key.to(tl.int64) * (2 * PAIRS)
            for side in tl.static_range(2):
                turn = turn + (_columns(angles + side * PAIRS, 0, PAIRS, COUNT),)
        scores = _scores(
            *(key_codes, firsts, seconds, mine, weights, turn, rates),
            *(DIM, BITS, PAIRS, BLOCK, CHUNK),
        )
        scores *= key_scale[None, :]
        wide = tl.max(more, 0) >= 0
        pool = tl.maximum(more, 0).to(tl.int64) * SIDES
        if wide:
            key_more = tl.load(more_scales + pool).to(tl.float32)
            key_more = tl.where(more >= 0, key_more, 0.0)
            codes_more = _codes(more_codes + pool * WIDTH, WIDTH, CHUNK)
            scores_more = _scores(
                *(codes_more, firsts, seconds, mine, weights, turn, rates),
                *(DIM, BITS, PAIRS, BLOCK, CHUNK),
            )
            scores += scores_more * key_more[None, :]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        # A value of scale 0 has no codes but 0.
        lifted = scores + tl.log2(tl.maximum(value_scale, TINY))[None, :]
        new = tl.maximum(largest, tl.max(lifted, 1))
        old = tl.exp2(largest - new)
        largest = new
        share = share * old + tl.sum(tl.exp2(scores - new[:, None]), 1)
        shares = tl.exp2(lifted - new[:, None] + LIFT)
        kept = ()
        for i in tl.static_range(len(totals)):
            kept = kept + (totals[i] * old[:, None],)
        totals = _mixed(kept, shares.to(tl.float16), value_codes, BITS)
        if wide:
            value_more = tl.load(more_scales + pool + (SIDES - 1)).to(tl.float32)
            value_more = tl.where(more >= 0, value_more, 0.0)
            codes_more = _codes(more_codes + (pool + (SIDES - 1)) * WIDTH, WIDTH, CHUNK)
            shares *= (value_more / tl.maximum(value_scale, TINY))[None, :]
            totals = _mixed(totals, shares.to(tl.float16), codes_more, BITS)

    for i in tl.static_range(len(totals)):
        byte = i // PARTS * CHUNK + column
        here = i % PARTS * (DIM // 2) + byte
        leave(sums, head, group, totals[i] * UNIT, here, byte < WIDTH, DIM)
    leave_marks(marks, head, group, largest, share)


@triton.jit
def _decode_plain(
    sums,
    marks,
    query,
    keys,
    values,
    tables,
    offsets,
    columns,
    kv_heads,
    group,
    window,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_in_turn(OVERLAP)
    batch = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    head = (tl.program_id(0) * group).to(tl.int64)
    offset = tl.load(offsets + batch).to(tl.int32)
    begin, end, low = share_of(offset, window, TILE)
    tables += batch.to(tl.int64) * columns
    row = tl.arange(0, ROWS)
    queries = ()
    totals = ()
    for i in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        column = i * CHUNK + tl.arange(0, CHUNK)
        here = (row < group)[:, None] & (column < DIM)[None, :]
        place = query + (head + row)[:, None] * DIM + column[None, :]
        queries = queries + (tl.load(place, mask=here, other=0.0),)
        totals = totals + (tl.zeros([ROWS, CHUNK], tl.float32),)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    for tile in range(begin, end):
        key = tile * TILE + tl.arange(0, TILE)
        seen = (key >= low) & (key <= offset)
        key = tl.minimum(tl.maximum(key, low), offset)
        page = tl.load(tables + key // PAGE).to(tl.int64)
        line = ((page * PAGE + key % PAGE) * kv_heads + kv_head) * DIM
        own_keys = _codes(keys + line, DIM, CHUNK)
        own_values = _codes(values + line, DIM, CHUNK)
        scores = tl.zeros([ROWS, TILE], tl.float32)
        for i in tl.static_range(len(queries)):
            scores = tl.dot(queries[i], tl.trans(own_keys[i]), scores)
        scores = tl.where(seen[None, :], scores * LOG2E, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        old = tl.exp2(largest - new)
        largest = new
        shares = tl.exp2(scores - new[:, None])
        share = share * old + tl.sum(shares, 1)
        kept = ()
        for i in tl.static_range(len(totals)):
            mixed = totals[i] * old[:, None]
            kept = kept + (tl.dot(shares.to(own_values[i].dtype), own_values[i], mixed),)
        totals = kept
    for i in tl.static_range(len(totals)):
        column = i * CHUNK + tl.arange(0, CHUNK)
        leave(sums, head, group, totals[i], column, column < DIM, DIM)
    leave_marks(marks, head, group, largest, share)


decode_narrow = Kernel(_decode_narrow, grid="B * kv_heads, splits")
decode_plain = Kernel(_decode_plain, grid="B * kv_heads, splits")
