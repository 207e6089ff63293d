"""The program of decode attention over narrow pages in 8 bits, by `mma` on NVIDIA's cards.

A step takes TILE keys, which pass through shared memory as they are stored, the next step's under
way while this one's are used: nothing is widened before the tensor cores want it. Keys are rows of
the left operand, of which each warp has sixteen, and up to eight query heads the columns of the
right one, in int8. Values are the left operand too, turned on their side on the way from shared
memory as pairs of neighbouring columns, which become float16 in five instructions for four codes;
each warp has a fourth of the columns, so that only scores' maxima and probabilities, in shared
memory, go from warp to warp.

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
_HEADS = gl.constexpr(HEADS)
_PART = gl.constexpr(32)
"""Rows of the Hadamard matrix that is held in registers, and columns of one turned product."""

_MMA = gl.constexpr(
    gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
)
_BYTES_LEFT = gl.constexpr(gl.DotOperandLayout(0, _MMA.value, 4))
_BYTES_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _MMA.value, 4))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _MMA.value, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _MMA.value, 2))
_COPY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0]))
_KEY = gl.constexpr(gl.SliceLayout(1, _MMA.value))
_HEAD = gl.constexpr(gl.SliceLayout(0, _MMA.value))
_COPIED = gl.constexpr(gl.SliceLayout(1, _COPY.value))
_SHARED = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
_SHARED_PAIRS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
_SHARED_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_SHARED_SHARES = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [0, 1]))

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
def _lines(tables, key, kv_heads, kv_head, PAGE: gl.constexpr, SIDES: gl.constexpr):
    """Where keys are in the cache: (of scales and codes, first side; of second digits)."""
    page = gl.load(tables + key // PAGE).to(gl.int32)
    line = (page * (SIDES * kv_heads) + kv_head) * PAGE + key % PAGE
    return line, (page * kv_heads + kv_head) * PAGE + key % PAGE


@gluon.jit
def _fetch(buffer, codes, line, fits, WIDTH: gl.constexpr):
    """Starts to copy the codes of some lines; of those that do not fit, zeros."""
    byte = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, _COPY))
    place = codes + line.to(gl.int64)[:, None] * WIDTH + byte[None, :]
    async_copy.async_copy_global_to_shared(buffer, place, mask=fits[:, None])


@gluon.jit
def _scores(
    codes,
    firsts,
    seconds,
    own,
    weights,
    turns,
    factors,
    plus,
    minus,
    PAIRS: gl.constexpr,
    CHUNK: gl.constexpr,
):
    """float32 [TILE, HEADS]: products of keys and queries, but for the keys' scales."""
    TILE: gl.constexpr = codes.shape[0]
    one = gl.zeros([TILE, _HEADS], gl.int32, _MMA)
    two = gl.zeros([TILE, _HEADS], gl.int32, _MMA)
    for i in gl.static_range(len(firsts)):
        x = codes.slice(2 * PAIRS + i * CHUNK, CHUNK, dim=1).load(_BYTES_LEFT)
        one = mma_v2(x, firsts[i], one)
        two = mma_v2(x, seconds[i], two)
    scores = (one.to(gl.float32) + two.to(gl.float32) * (1 / DIGIT)) * factors[0][None, :]
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
            low = gl.convert_layout(low, _LEFT, assert_trivial=True)
            high = gl.convert_layout(high, _LEFT, assert_trivial=True)
            turned = mma_v2(low, own.slice(2 * j * _PART, _PART, dim=0).load(_RIGHT), turned)
            turned = mma_v2(high, own.slice((2 * j + 1) * _PART, _PART, dim=0).load(_RIGHT), turned)
        scores += turned * factors[1][None, :]
    return scores


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
    batch = gl.program_id(0) // kv_heads
    kv_head = gl.program_id(0) % kv_heads
    head = (gl.program_id(0) * group).to(gl.int64)
    offset = gl.load(offsets + batch).to(gl.int32)
    low = gl.maximum(offset - window + 1, 0)
    first = low // TILE
    tiles = offset // TILE + 1 - first
    begin = first + tiles * gl.program_id(1) // gl.num_programs(1)
    end = first + tiles * (gl.program_id(1) + 1) // gl.num_programs(1)
    tables += batch.to(gl.int64) * columns

    # The query, a right operand: [columns, heads].
    wide_head = gl.arange(0, _HEADS, layout=gl.SliceLayout(0, _BYTES_RIGHT))
    byte = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, _BYTES_RIGHT))
    firsts = ()
    seconds = ()
    for i in gl.static_range((DIM - 2 * PAIRS) // CHUNK):
        place = digits + (head + wide_head)[None, :] * (2 * DIM)
        place += (2 * PAIRS + i * CHUNK + byte)[:, None]
        here = (wide_head < group)[None, :]
        firsts = firsts + (gl.load(place, mask=here, other=0),)
        seconds = seconds + (gl.load(place + DIM, mask=here, other=0),)
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
        pair = gl.arange(0, _PART, layout=gl.SliceLayout(1, _RIGHT))
        column = gl.arange(0, _PART, layout=_HEAD)
        asked = gl.arange(0, _HEADS, layout=gl.SliceLayout(0, _RIGHT))
        mine = gl.allocate_shared_memory(gl.float16, [2 * PAIRS, _HEADS], _SHARED_SHARES)
        weights = gl.allocate_shared_memory(gl.float32, [2 * PAIRS // _PART, _PART], _SHARED_PLAIN)
        for i in gl.static_range(2 * PAIRS // _PART):
            # Part j of the firsts of pairs, then part j of the seconds.
            start = i % 2 * PAIRS + i // 2 * _PART
            place = own + (head + asked)[None, :] * (2 * PAIRS) + (start + pair)[:, None]
            part = gl.load(place, mask=(asked < group)[None, :], other=0.0)
            mine.slice(i * _PART, _PART, dim=0).store(part)
            rate = gl.load(weight + i % 2 * (DIM // 2) + i // 2 * _PART + column)
            weights.index(i).store(rate * (0.5 / PAIRS))

    buffers = gl.allocate_shared_memory(gl.int8, [2 * SIDES, TILE, DIM], _SHARED)
    extra = gl.allocate_shared_memory(gl.int8, [SIDES, TILE, DIM], _SHARED)
    held = gl.allocate_shared_memory(gl.float16, [TILE, _HEADS], _SHARED_SHARES)
    copied = gl.arange(0, TILE, layout=_COPIED)
    scored = gl.arange(0, TILE, layout=_KEY)

    key = gl.minimum(gl.maximum(begin * TILE + copied, low), offset)
    line, place = _lines(tables, key, kv_heads, kv_head, PAGE, SIDES)
    more = gl.load(second + place)
    for side in gl.static_range(SIDES):
        _fetch(buffers.index(side), codes, line + side * kv_heads * PAGE, copied < TILE, DIM)
    async_copy.commit_group()
    key = gl.minimum(gl.maximum(begin * TILE + scored, low), offset)
    row, place = _lines(tables, key, kv_heads, kv_head, PAGE, SIDES)
    row_more = gl.load(second + place)
    key_scale = gl.load(scales + row)
    value_scale = gl.load(scales + row + (SIDES - 1) * kv_heads * PAGE)
    key = gl.minimum((begin + 1) * TILE + copied, offset)
    line, more_place = _lines(tables, gl.maximum(key, low), kv_heads, kv_head, PAGE, SIDES)
    key = gl.minimum((begin + 1) * TILE + scored, offset)
    row, row_place = _lines(tables, gl.maximum(key, low), kv_heads, kv_head, PAGE, SIDES)

    largest = gl.full([_HEADS], -float("inf"), gl.float32, _HEAD)
    share = gl.zeros([TILE, _HEADS], gl.float32, _MMA)
    even = gl.zeros([DIM // 2, _HEADS], gl.float32, _MMA)
    odd = gl.zeros([DIM // 2, _HEADS], gl.float32, _MMA)
    slot = 0
    for tile in range(begin, end):
        wide = gl.max(more, 0) >= 0
        pool = gl.maximum(more, 0) * SIDES
        barrier()
        if wide:
            for side in gl.static_range(SIDES):
                _fetch(extra.index(side), more_codes, pool + side, more >= 0, DIM)
        async_copy.commit_group()
        following = tile + 1 < end
        for side in gl.static_range(SIDES):
            _fetch(
                buffers.index((1 - slot) * SIDES + side),
                *(codes, line + side * kv_heads * PAGE, (copied < TILE) & following, DIM),
            )
        async_copy.commit_group()
        key = tile * TILE + scored
        seen = (key >= low) & (key <= offset)
        key = gl.minimum(gl.maximum(key, low), offset)
        turn = ()
        if PAIRS > 0:
            angle = gl.arange(0, _PART, layout=_HEAD)
            angles = turns + key.to(gl.int64)[:, None] * (2 * PAIRS) + angle[None, :]
            for i in gl.static_range(PAIRS // _PART):
                turn = turn + (gl.load(angles + i * _PART),)
                turn = turn + (gl.load(angles + PAIRS + i * _PART),)
        now_more, now_scale, now_value = row_more, key_scale.to(gl.float32), value_scale
        more = gl.load(second + more_place)
        row_more = gl.load(second + row_place)
        key_scale = gl.load(scales + row)
        value_scale = gl.load(scales + row + (SIDES - 1) * kv_heads * PAGE)
        key = gl.minimum((tile + 2) * TILE + copied, offset)
        line, more_place = _lines(tables, gl.maximum(key, low), kv_heads, kv_head, PAGE, SIDES)
        key = gl.minimum((tile + 2) * TILE + scored, offset)
        row, row_place = _lines(tables, gl.maximum(key, low), kv_heads, kv_head, PAGE, SIDES)

        async_copy.wait_group(2)
        barrier()
        scores = _scores(
            *(buffers.index(slot * SIDES), firsts, seconds, mine, weights, turn, rates),
            *(plus, minus, PAIRS, CHUNK),
        )
        scores *= now_scale[:, None]
        row_pool = gl.maximum(now_more, 0).to(gl.int64) * SIDES
        if wide:
            async_copy.wait_group(1)
            barrier()
            scale_more = gl.load(more_scales + row_pool).to(gl.float32)
            scale_more = gl.where(now_more >= 0, scale_more, 0.0)
            scores_more = _scores(
                *(extra.index(0), firsts, seconds, mine, weights, turn, rates),
                *(plus, minus, PAIRS, CHUNK),
            )
            scores += scores_more * scale_more[:, None]
        scores = gl.where(seen[:, None], scores, -float("inf"))
        # A value of scale 0 has no codes but 0.
        unit = gl.maximum(now_value.to(gl.float32), TINY)
        lifted = scores + gl.log2(unit)[:, None]
        new = gl.maximum(largest, gl.max(lifted, 0))
        old = gl.exp2(largest - new)
        largest = new
        share = share * old[None, :] + gl.exp2(scores - new[None, :])
        shares = gl.exp2(lifted - new[None, :] + LIFT)
        even = even * old[None, :]
        odd = odd * old[None, :]
        held.store(shares.to(gl.float16))
        values = buffers.index(slot * SIDES + SIDES - 1)
        values = values._reinterpret(gl.int16, [TILE, DIM // 2], _SHARED_PAIRS)
        even, odd = _mixed(even, odd, held, values, 16)
        if wide:
            scale_more = gl.load(more_scales + row_pool + (SIDES - 1)).to(gl.float32)
            scale_more = gl.where(now_more >= 0, scale_more, 0.0)
            held.store((shares * (scale_more / unit)[:, None]).to(gl.float16))
            values = extra.index(SIDES - 1)
            values = values._reinterpret(gl.int16, [TILE, DIM // 2], _SHARED_PAIRS)
            even, odd = _mixed(even, odd, held, values, 16)
        slot = 1 - slot
    async_copy.wait_group(0)

    place = (head + h) * gl.num_programs(1) + gl.program_id(1)
    pair = gl.arange(0, DIM // 2, layout=_KEY)
    target = sums + place[None, :] * DIM + 2 * pair[:, None]
    gl.store(target, even, mask=(h < group)[None, :])
    gl.store(target + 1, odd, mask=(h < group)[None, :])
    gl.store(marks + place * 2, largest, mask=h < group)
    gl.store(marks + place * 2 + 1, gl.sum(share, 0), mask=h < group)


decode_mma = Kernel(_decode_mma, grid="B * kv_heads, splits")
