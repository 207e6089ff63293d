"""N:16 int4 survivors made dense in registers, as an operand of NVIDIA's tensor cores.

A lane decodes whole groups of 16 columns, four rows of one at a time, so nothing is decoded twice
and no memory is needed between. That is possible because the columns of a product may come in any
order: a tensor instruction of 16 columns wants two pairs of them in each lane of four, so four such
instructions take from each lane just the 16 columns of its own group. The activations are put into
the same order by `interleave`, once for all rows.

For each survivor, a byte of a word: a shuffle fetches 16^place of its position (lane p holds that
of position p, for places 0 to 7 and 8 to 15 in two registers), and a multiply-add puts the value's
nibble there. Of the eight nibbles of a word, those 16 bits apart make a pair of bfloat16 by one
AND-XOR (128 + 8 + value) and one exact subtraction. About 11 instructions a survivor, 3.4 a weight.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STEP = 64
"""Columns decoded at a time: one group for each of four lanes."""


# Of each byte j of $8: its value (two's complement) times the lane's places, added to $11 to $18.
_PLACE = gl.constexpr(
    "{ .reg .b32 values, byte, value, place; and.b32 values, $8, 0xF0F0F0F0;"
    "shr.u32 values, values, 4;"
    + "".join(
        f"shr.u32 byte, $8, {8 * j}; prmt.b32 value, values, 0, 0x444{j};"
        f"shfl.sync.idx.b32 place, $9, byte, 31, -1;"
        f"mad.lo.u32 ${2 * j}, value, place, ${11 + 2 * j};"
        f"shfl.sync.idx.b32 place, $10, byte, 31, -1;"
        f"mad.lo.u32 ${2 * j + 1}, value, place, ${12 + 2 * j};"
        for j in range(4)
    )
    + "}"
)
_PLACE_REGISTERS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 11))
_WIDEN = gl.constexpr(
    "{ .reg .b32 part, one, minus; mov.b32 one, 0x3F803F80; mov.b32 minus, 0xC308C308;"
    + "".join(
        f"shr.u32 part, $4, {4 * c}; lop3.b32 part, part, 0x000F000F, 0x43084308, 0x6A;"
        f"fma.rn.bf16x2 ${c}, part, one, minus;"
        for c in range(4)
    )
    + "}"
)
_WIDEN_REGISTERS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 8))


@triton.jit
def interleave(out, x, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Column 16t + 8h + 4i + 2e + f of each 64 of x to 32h + 16i + 8e + 2t + f."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < count)
    half, fourth, eighth = place // 8 % 2, place // 4 % 2, place // 2 % 2
    to = 32 * half + 16 * fourth + 8 * eighth + place // 16 % 4 * 2 + place % 2
    tl.store(out + place // 64 * 64 + to, value, mask=place < count)


def word_layout(warps: int) -> gl.DistributedLinearLayout:
    """Of words [8 warps, 4]: eight lanes with a word of four rows each, times four groups."""
    return gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8 << i, 0] for i in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[8 * warps, 4],
    )


@gluon.jit
def places(WORDS: gl.constexpr, LAYOUT: gl.constexpr):
    """(16^place of positions 0 to 7, of 8 to 15), int32 [WORDS, 4], as the lanes hold them."""
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(1, LAYOUT))
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))
    position = group[None, :] + 4 * (word % 4)[:, None]
    place = 1 << (4 * ((position & 7) // 2 + 4 * (position & 1)))
    return gl.where(position < 8, place, 0), gl.where(position >= 8, place, 0)


@gluon.jit
def words_of(place, fits, KEPT: gl.constexpr):
    """The words of the KEPT slots of a group, 32 words apart."""
    words = ()
    for slot in gl.static_range(KEPT):
        word = gl.load(place + slot * 32, mask=fits, other=0, eviction_policy="evict_first")
        words = words + (word,)
    return words


@gluon.jit
def widened(words, low_place, high_place, KEPT: gl.constexpr):
    """bfloat16 [words, group 4, half 2, row 2, row 2, 8]; the rows' higher bit comes first."""
    low0 = gl.zeros_like(words[0])
    high0, low1, high1, low2, high2, low3, high3 = low0, low0, low0, low0, low0, low0, low0
    for slot in gl.static_range(KEPT):
        low0, high0, low1, high1, low2, high2, low3, high3 = gl.inline_asm_elementwise(
            _PLACE,
            _PLACE_REGISTERS,
            [
                words[slot],
                low_place,
                high_place,
                low0,
                high0,
                low1,
                high1,
                low2,
                high2,
                low3,
                high3,
            ],
            dtype=(
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
                gl.int32,
            ),
            is_pure=True,
            pack=1,
        )
    even = gl.join(gl.join(low0, high0), gl.join(low2, high2))
    odd = gl.join(gl.join(low1, high1), gl.join(low3, high3))
    # Eight copies of each word in the same registers: what the assembler makes eight values of.
    eight = gl.join(even, odd)
    eight = gl.join(eight, eight)
    eight = gl.join(eight, eight)
    eight = gl.join(eight, eight)
    return gl.inline_asm_elementwise(
        _WIDEN, _WIDEN_REGISTERS, [eight], dtype=gl.bfloat16, is_pure=True, pack=8
    )
