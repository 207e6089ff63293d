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
_SCAN = gl.constexpr(gl.BlockedLayout([8], [32], [WARPS], [0]))
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_BYTES = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
_BYTE_PAIRS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
_ON_SIDE = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [0, 1]))

# Two's complement plus 128 as the low byte of float16 1024, and 1152 off.
_WIDEN = gl.constexpr(
    "{ .reg .b32 codes, less; mov.b32 less, 0x64806480; xor.b32 codes, $2, 0x80808080;"
    "prmt.b32 $0, codes, 0x64646464, 0x4240; sub.rn.f16x2 $0, $0, less;"
    "prmt.b32 $1, codes, 0x64646464, 0x4341; sub.rn.f16x2 $1, $1, less; }"
)


def _turning() -> str:
    """Two sums $2, $3 and $4, $5, times weights $6 to $9, turned by cosines $10 and sines $11."""
    halves = "".join(
        f"mov.b32 {{low, high}}, ${place}; cvt.f32.f16 {name}0, low; cvt.f32.f16 {name}1, high;"
        for name, place in (("c", 10), ("s", 11))
    )
    each = "".join(
        f"cvt.rn.f32.s32 a, ${2 + i}; cvt.rn.f32.s32 b, ${4 + i};"
        f"mul.f32 a, a, ${6 + i}; mul.f32 b, b, ${8 + i};"
        f"mul.f32 x{i}, a, c{i}; mul.f32 minus, b, s{i}; sub.f32 x{i}, x{i}, minus;"
        f"mul.f32 y{i}, a, s{i}; fma.rn.f32 y{i}, b, c{i}, y{i};"
        for i in range(2)
    )
    return (
        "{ .reg .b16 low, high; .reg .f32 a, b, minus, c<2>, s<2>, x<2>, y<2>;"
        f"{halves}{each} cvt.rn.f16x2.f32 $0, x1, x0; cvt.rn.f16x2.f32 $1, y1, y0; }}"
    )


_TURN = gl.constexpr(_turning())


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
def _key(step, row, found, first, whole, count, low, offset, TILE: gl.constexpr):
    """The key of each row of a step, and whether it is a second digit and whether it counts.

    Of `whole` steps each row has a key of its own, from `first` on; after them come `count` keys
    with two rows each: those of the list, or, if there are too many for it, all from `first` on.
    """
    key = first + step * TILE + row
    index = (step - whole) * (TILE // 2) + row // 16 * 8 + row % 8
    listed = step >= whole
    there = index < count
    if listed:
        key = first + index
        if count <= _LISTED:
            key = gl.load(found + index, mask=there, other=0)
    counts = (key >= low) & (key <= offset) & (there | (step < whole))
    return gl.minimum(gl.maximum(key, low), offset), listed & (row // 8 % 2 == 1), counts


@gluon.jit
def _page(tables, key, PAGE: gl.constexpr):
    return gl.load(tables + key // PAGE).to(gl.int32)


@gluon.jit
def _copy(
    buffers,
    slot,
    codes,
    more_codes,
    second,
    page,
    key,
    is_second,
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
    place = codes + line.to(gl.int64) * WIDTH
    apart = gl.zeros_like(line) + kv_heads * (PAGE * WIDTH)
    fits = (key >= 0) & going
    if listed:
        more = gl.load(second + (page * kv_heads + kv_head) * PAGE + key % PAGE)
        fits = fits & ((more >= 0) | (is_second == 0))
        pool = more_codes + gl.maximum(more, 0).to(gl.int64) * (SIDES * WIDTH)
        place = gl.where(is_second, pool, place)
        apart = gl.where(is_second, WIDTH, apart)
    byte = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, _COPY))[None, :]
    for side in gl.static_range(SIDES):
        target = buffers.index(slot * SIDES + side)
        source = (place + side * apart)[:, None] + byte
        async_copy.async_copy_global_to_shared(target, source, mask=fits[:, None])
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
    one, two = gl.split(gl.permute(gl.reshape(sums, [TILE, 2, _HEADS]), [0, 2, 1]))
    one = gl.convert_layout(one, _MMA, assert_trivial=True).to(gl.float32)
    two = gl.convert_layout(two, _MMA, assert_trivial=True).to(gl.float32)
    scores = (one + two * (1 / DIGIT)) * rates[0][None, :]
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
def _mixed(even, odd, shares, codes, KEYS: gl.constexpr):
    """Adds values' columns 2i and 2i + 1, times shares: float32 [DIM / 2, HEADS] each."""
    for i in gl.static_range(codes.shape[0] // KEYS):
        share = shares.slice(i * KEYS, KEYS, dim=0).load(_RIGHT)
        pairs = codes.slice(i * KEYS, KEYS, dim=0).permute((1, 0)).load(_LEFT)
        x, y = gl.inline_asm_elementwise(
            _WIDEN, "=&r,=&r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
        )
        even = mma_v2(x, share, even)
        odd = mma_v2(y, share, odd)
    return even, odd


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
        tl.extra.cuda.gdc_wait()
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
    stride = kv_heads * PAGE

    # The query, in shared memory: a row for each digit of each head.
    asked = gl.allocate_shared_memory(gl.int8, [CHUNKS, 2 * _HEADS, CHUNK], _BYTES)
    byte = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, _COPY))
    row = gl.arange(0, 2 * _HEADS, layout=_COPIED)
    place = digits + ((head + row % _HEADS) * 2 + row // _HEADS)[:, None] * DIM + byte[None, :]
    here = (row % _HEADS < group)[:, None] & (byte >= 0)[None, :]
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

    found = lists + (gl.program_id(0) * gl.num_programs(1) + split).to(gl.int64) * _LISTED
    first = begin * TILE
    from_ = gl.maximum(first, low)
    until = gl.minimum(end * TILE, offset + 1)
    count = _list(found, tables, second, from_, until, kv_heads, kv_head, PAGE)
    whole = end - begin
    if count > _LISTED:
        count = whole * TILE
        whole = 0
    steps = whole + gl.cdiv(count, TILE // 2)
    barrier()

    buffers = gl.allocate_shared_memory(gl.int8, [2 * SIDES, TILE, DIM], _BYTES)
    held = gl.allocate_shared_memory(gl.float16, [TILE, _HEADS], _ON_SIDE)
    copied = gl.arange(0, TILE, layout=_COPIED)
    row = gl.arange(0, TILE, layout=_ROW)

    # Pages of a step are looked up in the one before; its codes are under way then.
    key, is_second, _ = _key(0, copied, found, first, whole, count, low, offset, TILE)
    page = _page(tables, key, PAGE)
    _copy(
        *(buffers, 0, codes, more_codes, second, page, key, is_second, whole == 0, steps > 0),
        *(kv_heads, kv_head, DIM, SIDES, PAGE),
    )
    key, is_second, _ = _key(1, copied, found, first, whole, count, low, offset, TILE)
    page = _page(tables, key, PAGE)
    row_key, row_second, row_counts = _key(0, row, found, first, whole, count, low, offset, TILE)
    row_page = _page(tables, row_key, PAGE)

    largest = gl.full([_HEADS], -float("inf"), gl.float32, _HEAD)
    share = gl.zeros([TILE, _HEADS], gl.float32, _MMA)
    even = gl.zeros([DIM // 2, _HEADS], gl.float32, _MMA)
    odd = gl.zeros([DIM // 2, _HEADS], gl.float32, _MMA)
    for step in range(0, steps):
        slot = step % 2
        barrier()
        going = step + 1 < steps
        _copy(
            *(buffers, 1 - slot, codes, more_codes, second, page, key, is_second),
            *(step + 1 >= whole, going, kv_heads, kv_head, DIM, SIDES, PAGE),
        )
        row_more = gl.load(second + (row_page * kv_heads + kv_head) * PAGE + row_key % PAGE)
        row_line = (row_page * (SIDES * kv_heads) + kv_head) * PAGE + row_key % PAGE
        key_scale = gl.load(scales + row_line)
        value_scale = key_scale
        if SIDES == 2:
            value_scale = gl.load(scales + row_line + stride)
        turn = ()
        if PAIRS > 0:
            angle = gl.arange(0, _PART, layout=_HEAD)
            angles = turns + row_key.to(gl.int64)[:, None] * (2 * PAIRS) + angle[None, :]
            for i in gl.static_range(PAIRS // _PART):
                turn = turn + (gl.load(angles + i * _PART),)
                turn = turn + (gl.load(angles + PAIRS + i * _PART),)
        async_copy.wait_group(1)
        barrier()
        own_codes = buffers.index(slot * SIDES)
        scores = _scores(own_codes, asked, mine, weights, turn, rates, plus, minus, PAIRS)
        key_unit = key_scale.to(gl.float32)
        unit = value_scale.to(gl.float32)
        counts = row_counts & ((row_more < 0) | (step >= whole))
        once = counts
        if step >= whole:
            pool = gl.maximum(row_more, 0).to(gl.int64) * SIDES
            there = row_more >= 0
            other = gl.load(more_scales + pool, mask=there, other=0.0).to(gl.float32)
            key_unit = gl.where(row_second, other, key_unit)
            other = gl.load(more_scales + pool + (SIDES - 1), mask=there, other=0.0)
            unit = gl.where(row_second, other.to(gl.float32), unit)
            once = counts & (row_second == 0)
        scores *= key_unit[:, None]
        if step >= whole:
            scores = _both(scores)
        scores = gl.where(counts[:, None], scores, -float("inf"))
        # A value of scale 0 has no codes but 0.
        lifted = scores + gl.log2(gl.maximum(unit, TINY))[:, None]
        largest_yet = gl.maximum(largest, gl.max(lifted, 0))
        # Nothing may have counted so far.
        base = gl.where(largest_yet == -float("inf"), 0.0, largest_yet)
        old = gl.exp2(largest - base)
        largest = largest_yet
        share = share * old[None, :] + gl.where(once[:, None], gl.exp2(scores - base[None, :]), 0.0)
        held.store(gl.exp2(lifted - base[None, :] + LIFT).to(gl.float16))
        even = even * old[None, :]
        odd = odd * old[None, :]

        key, is_second, _ = _key(step + 2, copied, found, first, whole, count, low, offset, TILE)
        row_key, row_second, row_counts = _key(
            step + 1, row, found, first, whole, count, low, offset, TILE
        )
        page = _page(tables, key, PAGE)
        row_page = _page(tables, row_key, PAGE)
        values = buffers.index(slot * SIDES + SIDES - 1)
        values = values._reinterpret(gl.int16, [TILE, DIM // 2], _BYTE_PAIRS)
        even, odd = _mixed(even, odd, held, values, 16)
    async_copy.wait_group(0)

    place = (head + h) * gl.num_programs(1) + split
    pair = gl.arange(0, DIM // 2, layout=_ROW)
    target = sums + place[None, :] * DIM + 2 * pair[:, None]
    gl.store(target, even, mask=(h < group)[None, :])
    gl.store(target + 1, odd, mask=(h < group)[None, :])
    gl.store(marks + place * 2, largest, mask=h < group)
    gl.store(marks + place * 2 + 1, gl.sum(share, 0), mask=h < group)


decode_mma = Kernel(_decode_mma, grid="B * kv_heads, splits")
