"""The products of decode attention by `mma`: rows by queries, values by probabilities.

In the columns that RoPE turns, codes are turned back by products with signs: a Hadamard matrix of
2 PAIRS rows is blocks of one with 32 rows, plus or minus, which stays in registers. Keys are then
weighted and turned in float32, and multiplied in float16.

Probabilities of a step become two digits under its largest, as a query has: p = (p1 + p2 / 254) /
127, so that values are multiplied as they are stored, in int8. Tensor cores want four keys of a
column in a register; turned on their side by pairs of bytes, two registers have four keys of two
columns, which takes two instructions to sort.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..splits import DIGIT
from .layouts import (
    BYTE_PAIRS,
    BYTES_LEFT,
    BYTES_RIGHT,
    COLUMNS,
    COUPLES,
    HEAD,
    HEADS,
    LEFT,
    MMA,
    PART,
    RIGHT,
)

_WHOLE = gl.constexpr(int(DIGIT.value))
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


@gluon.constexpr_function
def negative(row, column):
    """Whether a Hadamard matrix has -1 there."""
    return bin(row & column).count("1") % 2 == 1


@gluon.jit
def signs_of_hadamard():
    """int8 [32, 32], a right operand: 1 or -1."""
    row = gl.arange(0, PART, layout=gl.SliceLayout(1, BYTES_RIGHT))
    column = gl.arange(0, PART, layout=gl.SliceLayout(0, BYTES_RIGHT))
    bits = row[:, None] & column[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return (1 - 2 * (bits & 1)).to(gl.int8)


@gluon.jit
def columns_of(buffers, slot, start: gl.constexpr, COUNT: gl.constexpr):
    """Some columns of a step's codes, a left operand."""
    buffer = buffers[start // COLUMNS].index(slot)
    if COUNT < COLUMNS:
        buffer = buffer.slice(start % COLUMNS, COUNT, dim=1)
    return buffer.load(BYTES_LEFT)


@gluon.jit
def scores_of(buffers, slot, digits, own, weights, turns, rates, plus, minus, PAIRS: gl.constexpr):
    """float32 [TILE, HEADS]: products of rows and queries, but for the rows' scales."""
    TILE: gl.constexpr = buffers[0].shape[1]
    CHUNKS: gl.constexpr = digits.shape[0]
    CHUNK: gl.constexpr = digits.shape[2]
    sums = gl.zeros([TILE, 2 * HEADS], gl.int32, MMA)
    for i in gl.static_range(CHUNKS):
        x = columns_of(buffers, slot, 2 * PAIRS + i * CHUNK, CHUNK)
        sums = mma_v2(x, digits.index(i).permute((1, 0)).load(BYTES_RIGHT), sums)
    one, two = digits_apart(sums)
    scores = (one.to(gl.float32) + two.to(gl.float32) * (1 / DIGIT)) * rates[0][None, :]
    if PAIRS > 0:
        HALF: gl.constexpr = PAIRS // PART
        turned = gl.zeros([TILE, HEADS], gl.float32, MMA)
        parts = ()
        for i in gl.static_range(2 * HALF):
            parts = parts + (columns_of(buffers, slot, i * PART, PART),)
        for j in gl.static_range(HALF):
            left = gl.zeros([TILE, PART], gl.int32, MMA)
            right = gl.zeros([TILE, PART], gl.int32, MMA)
            for i in gl.static_range(2 * HALF):
                if negative(i, j):
                    left = mma_v2(parts[i], minus, left)
                else:
                    left = mma_v2(parts[i], plus, left)
                if negative(i, j + HALF):
                    right = mma_v2(parts[i], minus, right)
                else:
                    right = mma_v2(parts[i], plus, right)
            low, high = gl.inline_asm_elementwise(
                _TURN,
                "=&r,=&r,r,r,r,r,f,f,f,f,r,r",
                [
                    left,
                    right,
                    weights.index(2 * j).load(HEAD)[None, :],
                    weights.index(2 * j + 1).load(HEAD)[None, :],
                    turns[2 * j],
                    turns[2 * j + 1],
                ],
                dtype=(gl.float16, gl.float16),
                is_pure=True,
                pack=2,
            )
            for side in gl.static_range(2):
                mine = own.slice((2 * j + side) * PART, PART, dim=0).load(RIGHT)
                part = gl.convert_layout(high if side else low, LEFT, assert_trivial=True)
                turned = mma_v2(part, mine, turned)
        scores += turned * rates[1][None, :]
    return scores


@gluon.jit
def of_both_digits(scores):
    """The sum of rows r and r + 8 of sixteen, for both."""
    TILE: gl.constexpr = scores.shape[0]
    apart = gl.permute(gl.reshape(scores, [TILE // 16, 2, 8, HEADS]), [0, 2, 3, 1])
    first, other = gl.split(apart)
    total = gl.permute(gl.join(first + other, first + other), [0, 3, 1, 2])
    return gl.convert_layout(gl.reshape(total, [TILE, HEADS]), MMA, assert_trivial=True)


@gluon.jit
def keys_apart(x):
    """Of each 16 keys, the last dimension but one: 0, 1, 8, 9, 2, 3, 10, 11, ...

    So a thread has them that reads two of 16 bits where it wants four of 8.
    """
    ROWS: gl.constexpr = x.shape[0]
    KEYS: gl.constexpr = x.shape[1]
    apart = gl.permute(gl.reshape(x, [ROWS, KEYS // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    return gl.reshape(apart, [ROWS, KEYS])


@gluon.jit
def mixed(totals, shares, buffers, slot, old, unit):
    """Totals times old, plus values times shares times unit, float32 [64, HEADS] each.

    Of each buffer the even columns, then the odd ones.
    """
    TILE: gl.constexpr = buffers[0].shape[1]
    new = ()
    for i in gl.static_range(len(buffers)):
        even = gl.zeros([COUPLES, 2 * HEADS], gl.int32, MMA)
        odd = gl.zeros([COUPLES, 2 * HEADS], gl.int32, MMA)
        codes = buffers[i].index(slot)._reinterpret(gl.int16, [TILE, COUPLES], BYTE_PAIRS)
        for k in gl.static_range(TILE // 32):
            share = shares.slice(k * 32, 32, dim=0).load(BYTES_RIGHT)
            pairs = codes.slice(k * 32, 32, dim=0).permute((1, 0)).load(LEFT)
            pairs = gl.convert_layout(keys_apart(pairs), BYTES_LEFT, assert_trivial=True)
            x, y = gl.inline_asm_elementwise(
                _APART, "=&r,=r,r,r", [pairs], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
            )
            even = mma_v2(x, share, even)
            odd = mma_v2(y, share, odd)
        for side in gl.static_range(2):
            one, two = digits_apart(odd if side else even)
            whole = (one * _WHOLE + two).to(gl.float32)
            new = new + (totals[2 * i + side] * old[None, :] + whole * unit[None, :],)
    return new


@gluon.jit
def digits_apart(sums):
    """Products with first and with second digits of all heads."""
    ROWS: gl.constexpr = sums.shape[0]
    one, two = gl.split(gl.permute(gl.reshape(sums, [ROWS, 2, HEADS]), [0, 2, 1]))
    one = gl.convert_layout(one, MMA, assert_trivial=True)
    return one, gl.convert_layout(two, MMA, assert_trivial=True)


@gluon.jit
def two_digits(x):
    """int8 [keys, 2 HEADS] of numbers of 0 to 1 [keys, HEADS]: x = (first + second / 254) / 127."""
    first = gl.floor(x * 127 + 0.5)
    second = gl.floor((x * 127 - first) * DIGIT + 0.5)
    digits = gl.permute(gl.join(first.to(gl.int8), second.to(gl.int8)), [0, 2, 1])
    return gl.reshape(digits, [x.shape[0], 2 * HEADS])
