"""What threads have of prefill attention over heads of 512 numbers, and small steps of it.

`prefill_wide` tells what is computed. Two warpgroups have 64 of the 128 queries each. Shared memory
holds the queries in four parts of 128 columns, and six parts of 64 keys or values and 128 columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from . import wide_scratch
from .splits import LOG2E

BLOCK = gl.constexpr(wide_scratch.BLOCK)
TILE = gl.constexpr(wide_scratch.TILE)
DIM = gl.constexpr(wide_scratch.DIM)
HALF = gl.constexpr(DIM.value // 2)
PART = gl.constexpr(DIM.value // 4)
"""Columns of a part."""

SUMS = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 16])
)
SCORES = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 16])
)
ROWS = gl.constexpr(gl.SliceLayout(1, SUMS.value))
LEFT = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 32],
    )
)
"""Of pairs of neighbours, where `SCORES` and `LEFT` have them."""
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
"""Of a part on its way into shared memory: 16 bytes a thread."""
OWN = gl.constexpr(gl.BlockedLayout([4, 1, 4], [1, 32, 1], [1, 8, 1], [2, 1, 0]))
"""Of scratch memory, [lines, thread, 4]: what a thread wrote it reads itself."""


@gluon.jit
def zero_of(number):
    """0, of a number that is not negative; what comes of it the compiler cannot know before.

    Addresses of parts made of it are computed where they are used. Otherwise all of them would be
    kept in registers through all loops, which there are not enough of.
    """
    return gl.inline_asm_elementwise(
        "shr.s32 $0, $1, 31;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def parts_at(held, zero):
    """The parts [rows, PART] of allocations [1, rows, PART]."""
    found = ()
    for i in gl.static_range(len(held)):
        found += (held[i].index(zero),)
    return found


@gluon.jit
def places_of(source, row):
    """Where the numbers of a part are; `row` tells where its rows begin."""
    return source + (row[:, None] + gl.arange(0, PART, layout=gl.SliceLayout(0, COPY))[None, :])


@gluon.jit
def keys_from(source, first, last):
    """Where the first columns of keys `first` to `first` + TILE are, or of values.

    In place of those behind the last one it is there once more: what is behind may be no number,
    and times a probability of 0 still none.
    """
    row = first + gl.arange(0, TILE, layout=gl.SliceLayout(1, COPY))
    return places_of(source, gl.minimum(row, last - 1) * DIM)


@gluon.jit
def copy_key(parts, i: gl.constexpr, places):
    """Starts to copy the i-th part of a step's keys."""
    async_copy.async_copy_global_to_shared(parts[i], places + i * PART)
    async_copy.commit_group()


@gluon.jit
def copy_values(parts, i: gl.constexpr, places):
    """Starts to copy half the columns of a step's values into the parts i and i + 1."""
    async_copy.async_copy_global_to_shared(parts[i], places)
    async_copy.async_copy_global_to_shared(parts[i + 1], places + PART)
    async_copy.commit_group()


@gluon.jit
def multiply(shares, low, high, totals):
    """Starts to add probabilities times half the columns of a step's values."""
    left = warpgroup_mma(shares, low, totals[0], is_async=True)
    right = warpgroup_mma(shares, high, totals[1], is_async=True)
    return left, right


@gluon.jit
def softmax(scores, largest, share, position, first, MASKED: gl.constexpr):
    """Pairs of probabilities of a step's scores [BLOCK, TILE] under a new maximum.

    Also the maximum (a whole number), what becomes of the sum of all probabilities, and what is to
    be multiplied into sums under the old maximum. If MASKED, row r sees keys up to position + r.
    """
    if MASKED:
        key = first + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, SCORES))
        scores = gl.where(key[None, :] <= (position + row)[:, None], scores, -float("inf"))
    # All see something of the first step: the maximum is finite from then on.
    most = gl.convert_layout(gl.ceil(gl.max(scores, 1) * LOG2E), ROWS)
    new = gl.maximum(largest, most)
    base = gl.convert_layout(new, gl.SliceLayout(1, SCORES))
    shares = gl.exp2(scores * LOG2E - base[:, None])
    old = gl.exp2(largest - new)
    low, high = gl.split(gl.reshape(shares, [BLOCK, TILE // 2, 2]))
    pairs = gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;",
        "=r,f,f",
        [low, high],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    low, high = gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        "=&r,=r,r",
        [pairs],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )
    # The sum is of what is multiplied: a row that sees one key has just its value.
    own = gl.convert_layout(gl.sum(low + high, 1), gl.SliceLayout(1, SCORES))
    share = share * old + gl.convert_layout(own, ROWS)
    return gl.convert_layout(pairs, PAIRS, assert_trivial=True), new, share, old


@gluon.jit
def left_of(pairs):
    """bfloat16 [BLOCK, TILE] of pairs, as wgmma's left operand.

    (Loops carry pairs: bfloat16 would take a register each.)
    """
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;",
        "=h,=h,r",
        [pairs],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    whole = gl.reshape(gl.join(low, high), [BLOCK, TILE])
    return gl.convert_layout(whole, LEFT, assert_trivial=True)


@gluon.jit
def own_place(memory, LINES: gl.constexpr):
    """Where a thread's own numbers are, [LINES, thread, 4]."""
    line = gl.arange(0, LINES, layout=gl.SliceLayout(1, gl.SliceLayout(2, OWN)))
    thread = gl.arange(0, 256, layout=gl.SliceLayout(0, gl.SliceLayout(2, OWN)))
    fourth = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, OWN)))
    place = line[:, None, None] * 1024 + thread[None, :, None] * 4 + fourth[None, None, :]
    return memory + place


@gluon.jit
def put_pairs(memory, pairs):
    """Writes a step's pairs [BLOCK, TILE / 2] down."""
    # From warpgroup, warp, row, lane, step, column, lane.
    parts = gl.permute(gl.reshape(pairs, [2, 4, 2, 8, 4, 2, 4]), [4, 0, 1, 3, 6, 5, 2])
    parts = gl.convert_layout(gl.reshape(parts, [4, 256, 4]), OWN, assert_trivial=True)
    gl.store(own_place(memory, 4), parts)


@gluon.jit
def pairs_under(parts, factor):
    """Pairs [BLOCK, TILE / 2] that were written, times a power of two for each row."""
    parts = gl.permute(gl.reshape(parts, [4, 2, 4, 8, 4, 2, 2]), [1, 2, 6, 3, 0, 5, 4])
    pairs = gl.convert_layout(gl.reshape(parts, [BLOCK, TILE // 2]), PAIRS, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 two; cvt.rn.bf16x2.f32 two, $2, $2; mul.rn.bf16x2 $0, $1, two; }",
        "=r,r,f",
        [pairs, gl.convert_layout(factor, gl.SliceLayout(1, PAIRS))[:, None]],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def put_sums(place, total):
    """Writes sums [BLOCK, PART] down."""
    # From warpgroup, warp, row, lane, columns, lane, column.
    own = gl.permute(gl.reshape(total, [2, 4, 2, 8, 16, 4, 2]), [4, 0, 1, 3, 5, 2, 6])
    own = gl.convert_layout(gl.reshape(own, [16, 256, 4]), OWN, assert_trivial=True)
    gl.store(place, own)


@gluon.jit
def sums_at(place, there):
    """Sums [BLOCK, PART] that were written, or zeros if none were."""
    found = gl.load(place, mask=there, other=0.0)
    found = gl.permute(gl.reshape(found, [16, 2, 4, 8, 4, 2, 2]), [1, 2, 5, 3, 0, 4, 6])
    return gl.convert_layout(gl.reshape(found, [BLOCK, PART]), SUMS, assert_trivial=True)
