"""Packed weights made dense in registers, as an operand of NVIDIA's tensor cores.

A lane decodes whole groups of 16 columns, four rows of one at a time, so nothing is decoded twice
and no memory is needed between. That is possible because the columns of a product may come in any
order: a tensor instruction of 16 columns wants two pairs of them in each lane of four, so four such
instructions take from each lane just the 16 columns of its own group. The activations are put into
the same order by `interleave`, once for all rows.

N:16 int4: for each survivor, a byte of a word, a shuffle fetches 16^place of its position (lane p
holds that of position p, for places 0 to 7 and 8 to 15 in two registers), and a multiply-add puts
the value's nibble there. Dense int4 comes with its nibbles in place, and dense int8 is converted by
the processor's own instruction.

Of the eight nibbles of a word, those 16 bits apart make a pair of bfloat16, in one of two ways. By
one AND-XOR (128 + 8 + value) and one exact subtraction. Or as tiny numbers, by the AND-XOR alone:
the lowest four bits of a bfloat16 by themselves are a subnormal number, (8 + value) 2^-133, and the
four above them 16 times that. `interleave` multiplies the activations by what makes up for it, and
gives their sums, in three bfloat16; times -8 they are added to a scale's columns. All of this is
exact but the sums, to some 2^-24. So a program on Hopper with 16 tokens issues 10.8 instructions a
survivor in all; with the subtractions and a barrier for every 64 columns it was 15.1.

What tiny numbers give up: activations are multiplied by 2^80, so that those of 2^48 or more
overflow. They make no number of their token's results, as infinite ones do in any case (an infinity
times the zero of a column without a survivor); no model's activations come near. Those below 2^-73
lose bits of their sums.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import SPAN, Format

STEP = 64
"""Columns decoded at a time: one group for each of four lanes."""
_SPAN = gl.constexpr(SPAN)
_TIMES = gl.constexpr(2.0**80)
"""Of activations where weights are tiny, 2^-133 of what they stand for."""
_SUM_TIMES = gl.constexpr(2.0**-53)
TINY_TIMES = gl.constexpr(2.0**53)
"""What is still missing in sums of both."""


# Of each byte j of $8: its value (two's complement) times the lane's places, added to $11 to $18.
# A shuffle looks at the lower five bits of its index alone.
_PLACE = gl.constexpr(
    "{ .reg .b32 byte, value, place;"
    + "".join(
        (f"prmt.b32 byte, $8, 0, 0x444{j};" if j < 3 else "shr.u32 byte, $8, 24;")
        + f"shr.u32 value, byte, 4;"
        f"shfl.sync.idx.b32 place, $9, byte, 31, -1;"
        f"mad.lo.u32 ${2 * j}, value, place, ${11 + 2 * j};"
        f"shfl.sync.idx.b32 place, $10, byte, 31, -1;"
        f"mad.lo.u32 ${2 * j + 1}, value, place, ${12 + 2 * j};"
        for j in range(4)
    )
    + "}"
)
_PLACE_REGISTERS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 11))


def _widening(magic: int, minus: int) -> str:
    """Pairs of bfloat16 of the nibbles of $4: bits `magic` XOR the nibble, plus `minus`."""
    return (
        f"{{ .reg .b32 part, one, minus; mov.b32 one, 0x3F803F80; mov.b32 minus, {minus:#x};"
        + "".join(
            f"shr.u32 part, $4, {4 * c}; lop3.b32 part, part, 0x000F000F, {magic:#x}, 0x6A;"
            f"fma.rn.bf16x2 ${c}, part, one, minus;"
            for c in range(4)
        )
        + "}"
    )


WIDEN = gl.constexpr(_widening(0x43084308, 0xC308C308))
"""Of two's complement."""
WIDEN_BIASED = gl.constexpr(_widening(0x43004300, 0xC308C308))
"""Of value + 8."""
WIDEN_REGISTERS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 8))


def _tiny(magic: int) -> str:
    """Pairs of tiny bfloat16 of the nibbles of $4, XOR `magic`; those at odd places times 16."""
    return (
        "{ .reg .b32 upper; shr.u32 upper, $4, 8;"
        + "".join(
            f"lop3.b32 ${2 * half + odd}, {word}, {0xF000F << 4 * odd:#x}, "
            f"{magic << 4 * odd:#x}, 0x6A;"
            for half, word in enumerate(("$4", "upper"))
            for odd in range(2)
        )
        + "}"
    )


_TINY = gl.constexpr(_tiny(0x80008))
_TINY_BIASED = gl.constexpr(_tiny(0))


@triton.jit
def interleave(
    out,
    sums,
    x,
    count,
    columns,
    lines,
    TOGETHER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Column 16t + 8h + 4i + 2e + f of each 64 of x to 32h + 16i + 8e + 2t + f.

    If TOGETHER, the same 64 columns of all tokens come together: [K/64, lines, 64]. With GROUP, as
    tiny weights want them: times 2^80, a sixteenth of that where e is 1; and each GROUP's sum, as
    three bfloat16, in the first of 16 columns: `sums` [K/GROUP, lines, 16].
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    PIECES: tl.constexpr = BLOCK // 64
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)[:, None]
    column = tl.arange(0, 64)[None, :]
    fits = piece * 64 < count
    value = tl.load(x + piece * 64 + column, mask=fits, other=0.0)
    eighth = column // 2 % 2
    to = 32 * (column // 8 % 2) + 16 * (column // 4 % 2) + 8 * eighth
    to += column // 16 * 2 + column % 2
    if GROUP:
        wide = value.to(tl.float32)
        even = wide * _TIMES
        value = tl.where(eighth > 0, even * 0.0625, even).to(tl.bfloat16)
        GROUPS: tl.constexpr = BLOCK // GROUP
        left = tl.sum(tl.reshape(wide * _SUM_TIMES, [GROUPS, GROUP]), 1)
        group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
        part = tl.arange(0, 16)[None, :]
        high = left.to(tl.bfloat16)
        left -= high.to(tl.float32)
        middle = left.to(tl.bfloat16)
        left -= middle.to(tl.float32)
        parts = tl.where(part == 0, high[:, None], tl.where(part == 1, middle[:, None], 0.0))
        parts = tl.where(part == 2, left.to(tl.bfloat16)[:, None], parts)
        each_group = columns // GROUP
        place = group % each_group * lines + group // each_group
        tl.store(sums + place * 16 + part, parts.to(tl.bfloat16), mask=group * GROUP < count)
    if TOGETHER:
        each = columns // 64
        tl.store(out + (piece % each * lines + piece // each) * 64 + to, value, mask=fits)
    else:
        tl.store(out + piece * 64 + to, value, mask=fits)


def supports(format: Format, columns: int) -> bool:
    """Whether weights of this format can be decoded here."""
    integers = format.bits == 4 or (format.bits == 8 and format.dense)
    return integers and format.group % STEP == 0 and columns % STEP == 0


def word_layout(format: Format, warps: int, rows: int = 4) -> gl.DistributedLinearLayout:
    """Of the words of 64 columns: eight lanes with a word of `rows` rows, times four groups.

    [8 warps, 4] for each slot of N:16 int4; [8 warps, 4, 2, rows] of eight columns each for dense
    int4; [8 warps, 4, 16 columns] for dense int8.
    """
    own = [] if not format.dense else [2, rows] if format.bits == 4 else [16]
    none = [0] * len(own)
    registers = [
        [0, 0, *none[:axis], 1 << bit, *none[axis + 1 :]]
        for axis in reversed(range(len(own)))
        for bit in range(own[axis].bit_length() - 1)
    ]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        reg_bases=registers,
        lane_bases=[[*lane, *none] for lane in lanes],
        warp_bases=[[8 << bit, 0, *none] for bit in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[8 * warps, 4, *own],
    )


@gluon.constexpr_function
def words_a_column(kept, bits):
    """int32 words of a column of a tile, 128 weights."""
    return kept * 2 if kept < SPAN else bits * 4


@gluon.jit
def words_at(codes, tile, columns, KEPT: gl.constexpr, BITS: gl.constexpr, WORDS: gl.constexpr):
    """Pointers to a lane's words of the first 64 columns of a tile."""
    codes = codes.to(gl.pointer_type(gl.int32), bitcast=True)
    if KEPT < _SPAN:
        word = gl.arange(0, 32, layout=gl.SliceLayout(1, WORDS))[:, None]
        group = gl.arange(0, 4, layout=gl.SliceLayout(0, WORDS))[None, :]
        place = word + group * (KEPT * 32)
    elif BITS == 4:
        ROWS: gl.constexpr = gl.SliceLayout(3, WORDS)
        HALVES: gl.constexpr = gl.SliceLayout(2, ROWS)
        word = gl.arange(0, 32, layout=gl.SliceLayout(1, HALVES))[:, None, None, None]
        group = gl.arange(0, 4, layout=gl.SliceLayout(0, HALVES))[None, :, None, None]
        half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))
        ROW: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
        row = gl.arange(0, 4, layout=ROW)[None, None, None, :]
        place = group * 256 + half[None, None, :, None] * 128 + word * 4 + row
    else:
        LAST: gl.constexpr = gl.SliceLayout(2, WORDS)
        word = gl.arange(0, 32, layout=gl.SliceLayout(1, LAST))[:, None, None]
        group = gl.arange(0, 4, layout=gl.SliceLayout(0, LAST))[None, :, None]
        column = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))
        place = (group * 16 + column[None, None, :]) * 32 + word
    return codes + tile.to(gl.int64) * (columns * words_a_column(KEPT, BITS)) + place


@gluon.jit
def words_of(place, fits, KEPT: gl.constexpr):
    """The words of 64 columns: of the KEPT slots of a group, 32 words apart, or all of a dense."""
    words = ()
    for slot in gl.static_range(KEPT if KEPT < _SPAN else 1):
        if fits is None:
            word = gl.load(place + slot * 32, eviction_policy="evict_first")
        else:
            word = gl.load(place + slot * 32, mask=fits, other=0, eviction_policy="evict_first")
        words = words + (word,)
    return words


@gluon.jit
def places(KEPT: gl.constexpr, WORDS: gl.constexpr):
    """(16^place of positions 0 to 7, of 8 to 15), int32 [32, 4], as the lanes hold them."""
    if KEPT < _SPAN:
        word = gl.arange(0, 32, layout=gl.SliceLayout(1, WORDS))
        group = gl.arange(0, 4, layout=gl.SliceLayout(0, WORDS))
        position = group[None, :] + 4 * (word % 4)[:, None]
        place = 1 << (4 * ((position & 7) // 2 + 4 * (position & 1)))
        low, high = gl.where(position < 8, place, 0), gl.where(position >= 8, place, 0)
    else:
        low, high = 0, 0
    return low, high


@gluon.jit
def placed(words, low_place, high_place, KEPT: gl.constexpr):
    """Nibbles of survivors where dense int4 has them: int32 [words, 4, half 2, row 2, row 2].

    A dense weight's words as they are.
    """
    if KEPT == _SPAN:
        eight = words[0]
    else:
        eight = _scattered(words, low_place, high_place, KEPT)
    return eight


@gluon.jit
def _scattered(words, low_place, high_place, KEPT: gl.constexpr):
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
    return gl.join(even, odd)


@gluon.jit
def _bytes_of(word):
    """bfloat16 [32, 4, half 2, row 2, row 2, 8] of the four int8 rows of int32 [32, 4, 16]."""
    word = gl.reshape(word, [32, 4, 2, 8])
    row0 = ((word << 24) >> 24).to(gl.float32).to(gl.bfloat16)
    row1 = ((word << 16) >> 24).to(gl.float32).to(gl.bfloat16)
    row2 = ((word << 8) >> 24).to(gl.float32).to(gl.bfloat16)
    row3 = (word >> 24).to(gl.float32).to(gl.bfloat16)
    rows = gl.join(gl.join(row0, row2), gl.join(row1, row3))
    return gl.permute(rows, [0, 1, 2, 4, 5, 3])


@gluon.jit
def widened(words, KEPT: gl.constexpr, BITS: gl.constexpr, TINY: gl.constexpr = False):
    """bfloat16 [warp 4, lane 8, group 4, half 2, row 2, row 2, 2, 2, 2] of what `placed` gave; the
    rows' higher bit comes first, and the last three are i, e and f of `interleave`."""
    if BITS == 8:
        wide = _bytes_of(words)
    else:
        NORMAL: gl.constexpr = WIDEN if KEPT < _SPAN else WIDEN_BIASED
        SUBNORMAL: gl.constexpr = _TINY if KEPT < _SPAN else _TINY_BIASED
        NIBBLES: gl.constexpr = SUBNORMAL if TINY else NORMAL
        eight = gl.reshape(words, [32, 4, 2, 2, 2])
        # Eight copies of each word in the same registers: what the assembler makes eight values of.
        eight = gl.join(eight, eight)
        eight = gl.join(eight, eight)
        eight = gl.join(eight, eight)
        wide = gl.inline_asm_elementwise(
            NIBBLES, WIDEN_REGISTERS, [eight], dtype=gl.bfloat16, is_pure=True, pack=8
        )
    return gl.reshape(wide, [4, 8, 4, 2, 2, 2, 2, 2, 2])
