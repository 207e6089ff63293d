"""The program of decode attention over narrow pages in 8 bits, by `mma` on NVIDIA's cards.

A step takes TILE rows, which pass through shared memory as they are stored, the next step's under
way while this one's are used: nothing is widened before the tensor cores want it. Rows are those of
the left operand, of which each warp has sixteen, and two digits of up to eight query heads the
columns of the right one, in int8. Values are the left operand too, turned on their side on the way
from shared memory as pairs of neighbouring columns, which become float16 in five instructions for
four codes; each warp has a fourth of the columns, so that only scores' maxima and probabilities, in
shared memory, go from warp to warp.

A row is a key's first digit. Keys that have a second one are left out and listed before (`_list`);
behind the last of the others come steps with TILE / 2 of them, their two digits in rows r and r + 8
of sixteen, whose scores are added. If there are too many for the list, all keys are taken so.

In the columns that RoPE turns, codes are turned back by products with signs: a Hadamard matrix of
2 PAIRS rows is blocks of one with 32 rows, plus or minus, which stays in eight registers.

It gave up more than eight query heads a key head, digits of 4 bits, and heads that RoPE turns in
fewer than 64 columns; `decode_tiles` has these. `decode` tells what is computed.
"""

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..launching.launch import Kernel
from ..workspace import barrier
from .decode_tiles import LIFT, TINY
from .splits import DIGIT

HEADS = 8
"""Query heads of a key head, at most."""
WARPS = 4
LISTED = 512
"""Keys of a program that a list has room for."""
_HEADS = gl.constexpr(HEADS)
_LISTED = gl.constexpr(LISTED)
_SCANNED = gl.constexpr(1024)
"""Keys that are looked at together."""
_WHOLE = gl.constexpr(int(DIGIT.value))
_COPIED_BYTES = gl.constexpr(128)
"""Of a row, at once."""
_PART = gl.constexpr(32)
"""Rows of the Hadamard matrix that is held in registers, and columns of one turned product."""

_MMA = gl.constexpr(
    gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
)
_BYTES_LEFT = gl.constexpr(gl.DotOperandLayout(0, _MMA.value, 4))
_BYTES_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _MMA.value, 4))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _MMA.value, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _MMA.value, 2))
_ROW = gl.constexpr(gl.SliceLayout(1, _MMA.value))
_HEAD = gl.constexpr(gl.SliceLayout(0, _MMA.value))
_COPY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0]))
_COPIED = gl.constexpr(gl.SliceLayout(1, _COPY.value))
_ANGLES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
_SCAN = gl.constexpr(gl.BlockedLayout([8], [32], [WARPS], [0]))
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_BYTES = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
_BYTE_PAIRS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
_BYTES_ON_SIDE = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 4, [0, 1]))
_ON_SIDE = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [0, 1]))

# Of four keys' pairs of bytes the first ones, and the second ones.
_APART = gl.constexpr("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")


def _turning() -> str:
    """Two sums $2, $3 and $4, $5, times weights $6 to $9, turned by cosines $10 and sines $11."""
    halves = "".join(
        f"mov.b32 {{low, high}}, ${place}; cvt.f32.f16 {name}0, low; cvt.f32.f16 {name}1, high;"
        for name, place in (("c", 10), ("s", 11))
    )
    each = "".join(
        f"cvt.rn.f32.s32 a, ${2 + i}; cvt.rn.f32.s32 b, ${4 + i};"
        f"mul.f32 a, a, ${6 + i}; mul.f32 b, b, ${8 + i};"
        f"mul.f32 minus, b, s{i}; neg.f32 minus, minus; fma.rn.f32 x{i}, a, c{i}, minus;"
        f"mul.f32 y{i}, a, s{i}; fma.rn.f32 y{i}, b, c{i}, y{i};"
        for i in range(2)
    )
    return (
        "{ .reg .b16 low, high; .reg .f32 a, b, minus, c<2>, s<2>, x<2>, y<2>;"
        f"{halves}{each} cvt.rn.f16x2.f32 $0, x1, x0; cvt.rn.f16x2.f32 $1, y1, y0; }}"
    )


_TURN = gl.constexpr(_turning())


def together(tables: Tensor) -> Tensor:
    """Cosines and sines [positions, 2, pairs] with those next to each other that a thread reads.

    [positions, pairs / 32, cosines and sines, 4 threads, 4, 2], as products' sums lie in registers.
    """
    apart: Tensor = tables.unflatten(2, (-1, 4, 4, 2))
    return apart.permute(0, 2, 1, 4, 3, 5).contiguous()


@gluon.constexpr_function
def _negative(row, column):
    """Whether a Hadamard matrix has -1 there."""
    return bin(row & column).count("1") % 2 == 1


@gluon.jit
def _signs():
    """int8 [32, 32], a right operand: 1 or -1."""
    row = gl.arange(0, _PART, layout=gl.SliceLayout(1, _BYTES_RIGHT))
    column = gl.arange(0, _PART, layout=gl.SliceLayout(0, _BYTES_RIGHT))
    bits = row[:, None] & column[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return (1 - 2 * (bits & 1)).to(gl.int8)


@gluon.jit
def _sum(a, b):
    return a + b


@gluon.jit
def _list(found, tables, second, first, last, kv_heads, kv_head, PAGE: gl.constexpr):
    """Writes which keys of `first` to `last` - 1 have second digits, in order; how many there are.

    Those that a list has no room for are counted only.
    """
    count = 0
    for start in range(first, last, _SCANNED):
        key = start + gl.arange(0, _SCANNED, layout=_SCAN)
        inside = key < last
        page = gl.load(tables + key // PAGE, mask=inside, other=0).to(gl.int32)
        place = (page * kv_heads + kv_head) * PAGE + key % PAGE
        wide = gl.load(second + place, mask=inside, other=-1) >= 0
        order = count + gl.associative_scan(wide.to(gl.int32), 0, _sum)
        gl.store(found + order - 1, key, mask=wide & (order <= _LISTED))
        count += gl.sum(wide.to(gl.int32), 0)
    return count


@gluon.jit
def _index(step, row, whole, TILE: gl.constexpr):
    """Which of the keys with two rows each the rows of a step belong to."""
    return (step - whole) * (TILE // 2) + row // 16 * 8 + row % 8


@gluon.jit
def _key(step, row, found, first, whole, count, low, offset, TILE: gl.constexpr):
    """The key of each row of a step, or another one that is seen, where there is none.

    Of `whole` steps each row has a key of its own, from `first` on; after them come `count` keys
    with two rows each: those of the list, or, if there are too many for it, all from `first` on.
    """
    key = first + step * TILE + row
    if step >= whole:
        index = _index(step, row, whole, TILE)
        key = first + index
        if count <= _LISTED:
            key = gl.load(found + index, mask=index < count, other=0)
    return gl.minimum(gl.maximum(key, low), offset)


@gluon.jit
def _page(tables, key, PAGE: gl.constexpr):
    return gl.load(tables + key // PAGE).to(gl.int32)


@gluon.jit
def _about(
    second,
    scales,
    turns,
    page,
    key,
    kv_heads,
    kv_head,
    SIDES: gl.constexpr,
    PAIRS: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Of rows: where their second digits are, scales of key and value, cosines and sines."""
    line = (page * (SIDES * kv_heads) + kv_head) * PAGE + key % PAGE
    more = gl.load(second + (page * kv_heads + kv_head) * PAGE + key % PAGE)
    key_scale = gl.load(scales + line)
    value_scale = key_scale
    if SIDES == 2:
        value_scale = gl.load(scales + line + kv_heads * PAGE)
    found = ()
    if PAIRS > 0:
        place = turns + key.to(gl.int64) * (2 * PAIRS)
        place = gl.convert_layout(place, gl.SliceLayout(1, _ANGLES), assert_trivial=True)[:, None]
        place += gl.arange(0, 2 * _PART, layout=gl.SliceLayout(0, _ANGLES))[None, :]
        for i in gl.static_range(PAIRS // _PART):
            found = found + _turns_of(gl.load(place + 2 * i * _PART))
    return more, key_scale, value_scale, found


@gluon.jit
def _turns_of(angles):
    """(cosines, sines), [TILE, 32] each, of angles as `together` puts them."""
    ROWS: gl.constexpr = angles.shape[0]
    apart = gl.permute(gl.reshape(angles, [ROWS, 2, 4, 4, 2]), [0, 3, 2, 4, 1])
    cosines, sines = gl.split(gl.reshape(apart, [ROWS, _PART, 2]))
    cosines = gl.convert_layout(cosines, _MMA, assert_trivial=True)
    return cosines, gl.convert_layout(sines, _MMA, assert_trivial=True)


@gluon.jit
def _copy(
    buffers,
    slot,
    codes,
    more_codes,
    second,
    page,
    key,
    row,
    listed,
    going,
    kv_heads,
    kv_head,
    WIDTH: gl.constexpr,
    SIDES: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Starts to copy the codes of a step's rows; zeros of second digits that there are not."""
    line = (page * (SIDES * kv_heads) + kv_head) * PAGE + key % PAGE
    byte = gl.arange(0, _COPIED_BYTES, layout=gl.SliceLayout(0, _COPY))[None, :]
    place = codes + line.to(gl.int64)[:, None] * WIDTH + byte
    apart = kv_heads * (PAGE * WIDTH)
    fits = (row[:, None] >= 0) & going
    if listed:
        more = gl.load(second + (page * kv_heads + kv_head) * PAGE + key % PAGE)
        is_first = (row // 8 % 2 == 0)[:, None]
        fits = fits & ((more >= 0)[:, None] | is_first)
        pool = gl.maximum(more, 0).to(gl.int64)[:, None] * (SIDES * WIDTH)
        place = gl.where(is_first, place, more_codes + pool + byte)
    for side in gl.static_range(SIDES):
        if side == 1:
            if listed:
                place += gl.where((row // 8 % 2 == 0)[:, None], apart, WIDTH)
            else:
                place += apart
        target = buffers.index(slot * SIDES + side)
        for i in gl.static_range(WIDTH // _COPIED_BYTES):
            part = target.slice(i * _COPIED_BYTES, _COPIED_BYTES, dim=1)
            async_copy.async_copy_global_to_shared(part, place + i * _COPIED_BYTES, mask=fits)
    async_copy.commit_group()


@gluon.jit
def _scores(codes, digits, own, weights, turns, rates, plus, minus, PAIRS: gl.constexpr):
    """float32 [TILE, HEADS]: products of rows and queries, but for the rows' scales."""
    TILE: gl.constexpr = codes.shape[0]
    CHUNKS: gl.constexpr = digits.shape[0]
    CHUNK: gl.constexpr = digits.shape[2]
    sums = gl.zeros([TILE, 2 * _HEADS], gl.int32, _MMA)
    for i in gl.static_range(CHUNKS):
        x = codes.slice(2 * PAIRS + i * CHUNK, CHUNK, dim=1).load(_BYTES_LEFT)
        sums = mma_v2(x, digits.index(i).permute((1, 0)).load(_BYTES_RIGHT), sums)
    one, two = _digits(sums)
    scores = (one.to(gl.float32) + two.to(gl.float32) * (1 / DIGIT)) * rates[0][None, :]
    if PAIRS > 0:
        HALF: gl.constexpr = PAIRS // _PART
        turned = gl.zeros([TILE, _HEADS], gl.float32, _MMA)
        parts = ()
        for i in gl.static_range(2 * HALF):
            parts = parts + (codes.slice(i * _PART, _PART, dim=1).load(_BYTES_LEFT),)
        for j in gl.static_range(HALF):
            left = gl.zeros([TILE, _PART], gl.int32, _MMA)
            right = gl.zeros([TILE, _PART], gl.int32, _MMA)
            for i in gl.static_range(2 * HALF):
                if _negative(i, j):
                    left = mma_v2(parts[i], minus, left)
                else:
                    left = mma_v2(parts[i], plus, left)
                if _negative(i, j + HALF):
                    right = mma_v2(parts[i], minus, right)
                else:
                    right = mma_v2(parts[i], plus, right)
            low, high = gl.inline_asm_elementwise(
                _TURN,
                "=&r,=&r,r,r,r,r,f,f,f,f,r,r",
                [
                    left,
                    right,
                    weights.index(2 * j).load(_HEAD)[None, :],
                    weights.index(2 * j + 1).load(_HEAD)[None, :],
                    turns[2 * j],
                    turns[2 * j + 1],
                ],
                dtype=(gl.float16, gl.float16),
                is_pure=True,
                pack=2,
            )
            for side in gl.static_range(2):
                mine = own.slice((2 * j + side) * _PART, _PART, dim=0).load(_RIGHT)
                part = gl.convert_layout(high if side else low, _LEFT, assert_trivial=True)
                turned = mma_v2(part, mine, turned)
        scores += turned * rates[1][None, :]
    return scores


@gluon.jit
def _both(scores):
    """The sum of rows r and r + 8 of sixteen, for both."""
    TILE: gl.constexpr = scores.shape[0]
    apart = gl.permute(gl.reshape(scores, [TILE // 16, 2, 8, _HEADS]), [0, 2, 3, 1])
    first, other = gl.split(apart)
    total = gl.permute(gl.join(first + other, first + other), [0, 3, 1, 2])
    return gl.convert_layout(gl.reshape(total, [TILE, _HEADS]), _MMA, assert_trivial=True)


@gluon.jit
def _keys_apart(x):
    """Of each 16 keys, the last dimension but one: 0, 1, 8, 9, 2, 3, 10, 11, ...

    So a thread has them that reads two of 16 bits where it wants four of 8.
    """
    ROWS: gl.constexpr = x.shape[0]
    KEYS: gl.constexpr = x.shape[1]
    apart = gl.permute(gl.reshape(x, [ROWS, KEYS // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    return gl.reshape(apart, [ROWS, KEYS])


@gluon.jit
def _mixed(totals, shares, codes, old, unit, ROWS: gl.constexpr):
    """Totals times old, plus values times shares times unit, float32 [ROWS, HEADS] each.

    Of columns 2i, then 2i + 1, ROWS at a time.
    """
    new = ()
    for i in gl.static_range(len(totals) // 2):
        even = gl.zeros([ROWS, 2 * _HEADS], gl.int32, _MMA)
        odd = gl.zeros([ROWS, 2 * _HEADS], gl.int32, _MMA)
        for k in gl.static_range(codes.shape[0] // 32):
            share = shares.slice(k * 32, 32, dim=0).load(_BYTES_RIGHT)
            pairs = codes.slice(k * 32, 32, dim=0).slice(i * ROWS, ROWS, dim=1)
            pairs = _keys_apart(pairs.permute((1, 0)).load(_LEFT))
            pairs = gl.convert_layout(pairs, _BYTES_LEFT, assert_trivial=True)
            x, y = gl.inline_asm_elementwise(
                _APART, "=&r,=r,r,r", [pairs], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
            )
            even = mma_v2(x, share, even)
            odd = mma_v2(y, share, odd)
        for side in gl.static_range(2):
            one, two = _digits(odd if side else even)
            whole = (one * _WHOLE + two).to(gl.float32)
            new = new + (totals[2 * i + side] * old[None, :] + whole * unit[None, :],)
    return new


@gluon.jit
def _digits(sums):
    """Products with first and with second digits of all heads."""
    ROWS: gl.constexpr = sums.shape[0]
    one, two = gl.split(gl.permute(gl.reshape(sums, [ROWS, 2, _HEADS]), [0, 2, 1]))
    one = gl.convert_layout(one, _MMA, assert_trivial=True)
    return one, gl.convert_layout(two, _MMA, assert_trivial=True)


@gluon.jit
def _two_digits(x):
    """int8 [keys, 2 HEADS] of numbers of 0 to 1 [keys, HEADS]: x = (first + second / 254) / 127."""
    first = gl.floor(x * 127 + 0.5)
    second = gl.floor((x * 127 - first) * DIGIT + 0.5)
    digits = gl.permute(gl.join(first.to(gl.int8), second.to(gl.int8)), [0, 2, 1])
    return gl.reshape(digits, [x.shape[0], 2 * _HEADS])


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
    low = gl.maximum(offset - window + 1, 0)
    tiles = offset // TILE + 1 - low // TILE
    begin = low // TILE + tiles * split // gl.num_programs(1)
    end = low // TILE + tiles * (split + 1) // gl.num_programs(1)
    tables += batch.to(gl.int64) * columns

    found = lists + (gl.program_id(0) * gl.num_programs(1) + split).to(gl.int64) * _LISTED
    first = begin * TILE
    from_ = gl.maximum(first, low)
    until = gl.minimum(end * TILE, offset + 1)
    count = _list(found, tables, second, from_, until, kv_heads, kv_head, PAGE)
    whole = end - begin
    if count > _LISTED:
        first = from_
        count = until - from_
        whole = 0
    steps = whole + gl.cdiv(count, TILE // 2)
    barrier()

    buffers = gl.allocate_shared_memory(gl.int8, [2 * SIDES, TILE, DIM], _BYTES)
    shares = gl.allocate_shared_memory(gl.int8, [TILE, 2 * _HEADS], _BYTES_ON_SIDE)
    copied = gl.arange(0, TILE, layout=_COPIED)
    row = gl.arange(0, TILE, layout=_ROW)

    # Pages of a step are looked up in the one before; its codes are under way then.
    key = _key(0, copied, found, first, whole, count, low, offset, TILE)
    page = _page(tables, key, PAGE)
    _copy(
        *(buffers, 0, codes, more_codes, second, page, key, copied, whole == 0, steps > 0),
        *(kv_heads, kv_head, DIM, SIDES, PAGE),
    )
    if OVERLAP:
        # `turn_query` runs till here at most: what was before it is over, or it would not run.
        tl.extra.cuda.gdc_wait()
    # The query, in shared memory: a row for each digit of each head.
    asked = gl.allocate_shared_memory(gl.int8, [CHUNKS, 2 * _HEADS, CHUNK], _BYTES)
    byte = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, _COPY))
    asked_row = gl.arange(0, 2 * _HEADS, layout=_COPIED)
    place = (
        digits
        + ((head + asked_row % _HEADS) * 2 + asked_row // _HEADS)[:, None] * DIM
        + byte[None, :]
    )
    here = (asked_row % _HEADS < group)[:, None] & (byte >= 0)[None, :]
    for i in gl.static_range(CHUNKS):
        asked.index(i).store(gl.load(place + (2 * PAIRS + i * CHUNK), mask=here, other=0))
    h = gl.arange(0, _HEADS, layout=_HEAD)
    rates = (gl.load(factors + (head + h) * 2, mask=h < group, other=0.0),)
    mine = 0
    weights = 0
    plus = 0
    minus = 0
    if PAIRS > 0:
        rates = rates + (gl.load(factors + (head + h) * 2 + 1, mask=h < group, other=0.0),)
        plus = _signs()
        minus = -plus
        mine = gl.allocate_shared_memory(gl.float16, [2 * PAIRS, _HEADS], _ON_SIDE)
        weights = gl.allocate_shared_memory(gl.float32, [2 * PAIRS // _PART, _PART], _PLAIN)
        pair = gl.arange(0, _PART, layout=_ROW)
        column = gl.arange(0, _PART, layout=_HEAD)
        for i in gl.static_range(2 * PAIRS // _PART):
            # Part j of the firsts of pairs, then part j of the seconds.
            start = i % 2 * PAIRS + i // 2 * _PART
            place = own + (head + h)[None, :] * (2 * PAIRS) + (start + pair)[:, None]
            part = gl.load(place, mask=(h < group)[None, :], other=0.0)
            mine.slice(i * _PART, _PART, dim=0).store(part)
            rate = gl.load(weight + i % 2 * (DIM // 2) + i // 2 * _PART + column)
            weights.index(i).store(rate * (0.5 / PAIRS))

    key = _key(1, copied, found, first, whole, count, low, offset, TILE)
    row_key = _key(0, row, found, first, whole, count, low, offset, TILE)
    page = _page(tables, key, PAGE)
    row_page = _page(tables, row_key, PAGE)

    largest = gl.full([_HEADS], -float("inf"), gl.float32, _HEAD)
    share = gl.zeros([TILE, _HEADS], gl.float32, _MMA)
    ROWS: gl.constexpr = min(DIM // 2, 128)
    totals = ()
    for _ in gl.static_range(DIM // ROWS):
        totals = totals + (gl.zeros([ROWS, _HEADS], gl.float32, _MMA),)
    for step in range(0, steps):
        row_more, key_scale, value_scale, turn = _about(
            *(second, scales, turns, row_page, row_key, kv_heads, kv_head),
            *(SIDES, PAIRS, PAGE),
        )
        async_copy.wait_group(0)
        # Nobody reads any more what the next step's codes are written over.
        barrier()
        slot = step % 2
        going = step + 1 < steps
        _copy(
            *(buffers, 1 - slot, codes, more_codes, second, page, key, copied),
            *(step + 1 >= whole, going, kv_heads, kv_head, DIM, SIDES, PAGE),
        )
        own_codes = buffers.index(slot * SIDES)
        scores = _scores(own_codes, asked, mine, weights, turn, rates, plus, minus, PAIRS)
        key_unit = key_scale.to(gl.float32)
        unit = value_scale.to(gl.float32)
        own_key = first + step * TILE + row
        counts = (own_key >= low) & (own_key <= offset) & (row_more < 0)
        once = counts
        if step >= whole:
            is_first = row // 8 % 2 == 0
            counts = _index(step, row, whole, TILE) < count
            once = counts & is_first
            there = row_more >= 0
            pool = more_scales + gl.maximum(row_more, 0).to(gl.int64) * SIDES
            other = gl.load(pool, mask=there, other=0.0).to(gl.float32)
            key_unit = gl.where(is_first, key_unit, other)
            other = gl.load(pool + (SIDES - 1), mask=there, other=0.0).to(gl.float32)
            unit = gl.where(is_first, unit, other)
        scores *= key_unit[:, None]
        if step >= whole:
            scores = _both(scores)
        scores = gl.where(counts[:, None], scores, -float("inf"))
        # A value of scale 0 has no codes but 0.
        lifted = scores + gl.log2(gl.maximum(unit, TINY))[:, None]
        # Nothing may have counted in this step, or so far.
        most = gl.max(lifted, 0)
        largest_yet = gl.maximum(largest, most)
        base = gl.where(largest_yet == -float("inf"), 0.0, largest_yet)
        old = gl.exp2(largest - base)
        unit_of_step = gl.exp2(most - base + LIFT) * (1 / (127 * DIGIT))
        largest = largest_yet
        share = share * old[None, :] + gl.where(once[:, None], gl.exp2(scores - base[None, :]), 0.0)
        most = gl.where(most == -float("inf"), 0.0, most)
        parts = _two_digits(gl.exp2(lifted - most[None, :]))
        shares.store(gl.permute(_keys_apart(gl.permute(parts, [1, 0])), [1, 0]))

        key = _key(step + 2, copied, found, first, whole, count, low, offset, TILE)
        row_key = _key(step + 1, row, found, first, whole, count, low, offset, TILE)
        page = _page(tables, key, PAGE)
        row_page = _page(tables, row_key, PAGE)
        values = buffers.index(slot * SIDES + SIDES - 1)
        values = values._reinterpret(gl.int16, [TILE, DIM // 2], _BYTE_PAIRS)
        totals = _mixed(totals, shares, values, old, unit_of_step, ROWS)
    async_copy.wait_group(0)

    place = (head + h) * gl.num_programs(1) + split
    pair = gl.arange(0, ROWS, layout=_ROW)
    target = sums + place[None, :] * DIM + 2 * pair[:, None]
    for i in gl.static_range(DIM // ROWS):
        place_of_part = target + (i // 2 * (2 * ROWS) + i % 2)
        gl.store(place_of_part, totals[i], mask=(h < group)[None, :])
    gl.store(marks + place * 2, largest, mask=h < group)
    gl.store(marks + place * 2 + 1, gl.sum(share, 0), mask=h < group)


decode_mma = Kernel(_decode_mma, grid="B * kv_heads, splits")
