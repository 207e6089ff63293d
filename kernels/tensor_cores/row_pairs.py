"""Packed weights made dense in registers by eight warps, of which a lane has two rows.

As `decode`, where four warps have four rows a lane: then sums of 256 tokens would not fit. Of a
word of four rows only half is loaded. A survivor of N:16 int4 is put in place by a shift: its value
goes to the nibble of its position within 64 bits. (Shuffles, as in `decode`, pass through shared
memory's pipe, which wgmma needs for the activations; shifts take a third more of the integer units'
time, and are faster.) So nibble j of a sparse weight is column j of a half, and its activations
come in another order than a dense one's: `arrange` knows both.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import SPAN
from .decode import WIDEN, WIDEN_BIASED, WIDEN_REGISTERS

ROWS = 2
"""Of a lane."""
_SPAN = gl.constexpr(SPAN)


@triton.jit
def arrange(
    out,
    x,
    tokens,
    columns,
    TOKENS: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x [tokens, columns] to [blocks, columns / 64, TOKENS, 64], zeros for tokens there are not.

    Column 16t + 8h + 4i + 2e + f of each 64 goes to 32h + 16i + 8e + 2t + f; if SPARSE that is
    column 16t + 8h + 4f + 2i + e. So what a program needs of 64 columns lies together.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    to = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = to // 64
    step = line // TOKENS
    token = step // (columns // 64) * TOKENS + line % TOKENS
    half, i, e, group, f = to // 32 % 2, to // 16 % 2, to // 8 % 2, to // 2 % 4, to % 2
    own = 4 * f + 2 * i + e if SPARSE else 4 * i + 2 * e + f
    column = step % (columns // 64) * 64 + 16 * group + 8 * half + own
    value = tl.load(x + token * columns + column, mask=token < tokens, other=0.0)
    tl.store(out + to, value)


@gluon.constexpr_function
def elements_a_step(kept, bits):
    """Elements of `codes_at` in 64 columns of a tile."""
    return kept * 256 if kept < SPAN else bits * 256 if bits == 4 else 4096


@gluon.jit
def codes_at(codes, KEPT: gl.constexpr, BITS: gl.constexpr, WORDS: gl.constexpr):
    """Pointers to a lane's codes of the first 64 columns of the first tile."""
    if KEPT < _SPAN:
        word = gl.arange(0, 64, layout=gl.SliceLayout(1, WORDS))[:, None]
        group = gl.arange(0, 4, layout=gl.SliceLayout(0, WORDS))[None, :]
        place = word + group * (KEPT * 64)
        codes = codes.to(gl.pointer_type(gl.uint16), bitcast=True)
    elif BITS == 4:
        LINES: gl.constexpr = gl.SliceLayout(3, WORDS)
        HALVES: gl.constexpr = gl.SliceLayout(2, LINES)
        word = gl.arange(0, 64, layout=gl.SliceLayout(1, HALVES))[:, None, None, None]
        group = gl.arange(0, 4, layout=gl.SliceLayout(0, HALVES))[None, :, None, None]
        half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, LINES)))
        ROW: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
        row = gl.arange(0, 2, layout=ROW)[None, None, None, :]
        place = group * 256 + half[None, None, :, None] * 128 + word * 2 + row
        codes = codes.to(gl.pointer_type(gl.int32), bitcast=True)
    else:
        LAST: gl.constexpr = gl.SliceLayout(2, WORDS)
        word = gl.arange(0, 64, layout=gl.SliceLayout(1, LAST))[:, None, None]
        group = gl.arange(0, 4, layout=gl.SliceLayout(0, LAST))[None, :, None]
        column = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))
        place = (group * 16 + column[None, None, :]) * 64 + word
        codes = codes.to(gl.pointer_type(gl.uint16), bitcast=True)
    return codes + place


@gluon.jit
def codes_of(place, KEPT: gl.constexpr):
    """The codes of 64 columns: of the KEPT slots of a group, 64 elements apart, or of a dense."""
    codes = ()
    for slot in gl.static_range(KEPT if KEPT < _SPAN else 1):
        code = gl.load(place + slot * 64, eviction_policy="evict_first")
        codes = codes + (code.to(gl.int32),)
    return codes


@gluon.jit
def row_of(r):
    """The row in its tile of row r of the sums: lane r % 8, which of its two rows, the warp."""
    return r // 16 * 16 + r % 8 * 2 + r // 8 % 2


@gluon.jit
def _scattered(codes, KEPT: gl.constexpr):
    row0 = gl.zeros_like(codes[0]).to(gl.uint64)
    row1 = row0
    for slot in gl.static_range(KEPT):
        code = codes[slot].to(gl.uint32, bitcast=True)
        row0 |= ((code >> 4) & 15).to(gl.uint64) << ((code << 2) & 60).to(gl.uint64)
        row1 |= (code >> 12).to(gl.uint64) << ((code >> 6) & 60).to(gl.uint64)
    low0, high0 = row0.to(gl.int32), (row0 >> 32).to(gl.int32)
    low1, high1 = row1.to(gl.int32), (row1 >> 32).to(gl.int32)
    return gl.join(gl.join(low0, high0), gl.join(low1, high1))


@gluon.jit
def _bytes_of(codes):
    """bfloat16 [64, 4, half 2, row 2, 8] of the two int8 rows of int32 [64, 4, 16]."""
    word = gl.reshape(codes, [64, 4, 2, 8])
    row0 = ((word << 24) >> 24).to(gl.float32).to(gl.bfloat16)
    row1 = ((word << 16) >> 24).to(gl.float32).to(gl.bfloat16)
    return gl.permute(gl.join(row0, row1), [0, 1, 2, 4, 3])


@gluon.jit
def operand_of(codes, factor, KEPT: gl.constexpr, BITS: gl.constexpr, LEFT: gl.constexpr):
    """bfloat16 [128, 64] as wgmma's left operand, times the rows' scales.

    Row 16w + 8b + l of it is row 16w + 2l + b of the tile.
    """
    if BITS == 8:
        wide = _bytes_of(codes[0])
    else:
        NIBBLES: gl.constexpr = WIDEN if KEPT < _SPAN else WIDEN_BIASED
        if KEPT == _SPAN:
            eight = codes[0]
        else:
            eight = _scattered(codes, KEPT)
        # Eight copies of each word in the same registers: what the assembler makes eight values of.
        eight = gl.join(eight, eight)
        eight = gl.join(eight, eight)
        eight = gl.join(eight, eight)
        wide = gl.inline_asm_elementwise(
            NIBBLES, WIDEN_REGISTERS, [eight], dtype=gl.bfloat16, is_pure=True, pack=8
        )
    # From warp, lane, group, half, row, i, e, f.
    wide = gl.permute(gl.reshape(wide, [8, 8, 4, 2, 2, 2, 2, 2]), [0, 4, 1, 3, 5, 6, 2, 7])
    left = gl.convert_layout(gl.reshape(wide, [128, 64]), LEFT, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;",
        "=r,r,r",
        [left, gl.convert_layout(factor, gl.SliceLayout(1, LEFT))[:, None]],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )
