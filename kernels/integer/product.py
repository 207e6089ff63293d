"""Products of rows in digits and weights of 8-bit integers by `wgmma`, on Hopper; see `product`.

One program a processor, of two warpgroups, takes tiles of 128 rows and 256 of the weight's in turn,
row tiles fastest, so that programs that run together read the same weights. Of a tile, second
digits come first, in the blocks of 128 columns that have any; their sums times 254, exactly, are
what those of first digits are added to. Blocks are copied two steps ahead, from tile to tile
without a stop, and while a product runs the next one is begun.

Sums are of 32 bits and exact: results do not depend on how rows lie.

It gave up sharing the last tiles among all programs by columns ("stream-K"): rows of the weight
that several programs read at different times come from memory each time.
"""

from collections.abc import Iterator

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..launching.launch import Kernel, Variant
from ..launching.targets import HOPPER, processors_of
from ..workspace import barrier, epilogue_of, gated
from . import digits
from .digits import Digits

WARPS = 8
ROWS = 256
"""Of the weight, in a tile."""
_STAGES = gl.constexpr(4)
"""Blocks in shared memory: of the product before, the present one, and two under way."""
_TALL = gl.constexpr(digits.TALL)
_WIDE = gl.constexpr(digits.WIDE)
_ROWS = gl.constexpr(ROWS)
_SECOND = gl.constexpr(digits.SECOND)
_PART = gl.constexpr(64)
"""Of the weight's rows in a tile, whose sums are stored together."""
_ADDED, _GATED = gl.constexpr(1), gl.constexpr(2)
"""As in `workspace`."""
_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
_COPY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0]))
_SUMS = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 32])
)
_PARTS = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 32])
)
_OUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))
_HALF = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0]))


@gluon.jit
def _tile_at(tile, marks, tokens, columns, tall):
    """A tile's places [_TALL], and the list of its blocks with second digits, its length first."""
    place = tile % tall * _TALL + gl.arange(0, _TALL, layout=gl.SliceLayout(1, _COPY))
    listed = marks + (1 + tile % tall) * (1 + 2 * (columns // _WIDE))
    return gl.minimum(place, tokens - 1), listed, gl.load(listed)


@gluon.jit
def _following(ahead, marks, tokens, columns, tall):
    """What is copied after `ahead`: (tile, step, places, list, its length)."""
    tile, step, place, listed, seconds = ahead
    step = step + 1
    if step == seconds + columns // _WIDE:
        step = 0
        tile = tile + gl.num_programs(0)
        place, listed, seconds = _tile_at(tile, marks, tokens, columns, tall)
    return tile, step, place, listed, seconds


@gluon.jit
def _copy(held, slot, ahead, codes, weight, ones, tokens, rows, columns, tall):
    """Starts to copy a block of a tile's digits and of the weight's rows."""
    left, right = held
    tile, step, place, listed, seconds = ahead
    column = gl.arange(0, _WIDE, layout=gl.SliceLayout(0, _COPY))
    block = step - seconds
    if step < seconds:
        block = gl.load(listed + 1 + step)
        at = (place + tokens) * columns + block * _WIDE
        # Rows with one digit have no second one, not even zeros.
        there = (place >= ones)[:, None] & (column >= 0)[None, :]
        async_copy.async_copy_global_to_shared(
            left.index(slot), codes + (at[:, None] + column[None, :]), mask=there
        )
    else:
        at = place * columns + block * _WIDE
        async_copy.async_copy_global_to_shared(
            left.index(slot), codes + (at[:, None] + column[None, :])
        )
    own = tile // tall * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _COPY))
    own = gl.minimum(own, rows - 1) * columns + block * _WIDE
    async_copy.async_copy_global_to_shared(
        right.index(slot), weight + (own[:, None] + column[None, :])
    )
    async_copy.commit_group()


@gluon.jit
def _multiplied(
    held,
    sums,
    slot,
    ahead,
    count,
    codes,
    weight,
    marks,
    ones,
    tokens,
    rows,
    columns,
    tall,
):
    """`sums` with the products of `count` steps; the copies of the first ones are under way."""
    left, right = held
    for _ in range(count):
        # All but the latest copies are there. Behind the barrier, all threads have waited for the
        # product before the last: its place is free.
        async_copy.wait_group(_STAGES - 3)
        fence_async_shared()
        barrier()
        free = (slot + (_STAGES - 2)) % _STAGES
        own = right.index(slot).permute((1, 0))
        # Before the product, not behind it: 5 % faster, though the fence that the compiler puts
        # between them waits for the copies.
        _copy(held, free, ahead, codes, weight, ones, tokens, rows, columns, tall)
        ahead = _following(ahead, marks, tokens, columns, tall)
        sums = warpgroup_mma(left.index(slot), own, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        slot = (slot + 1) % _STAGES
    return warpgroup_mma_wait(0, deps=(sums,)), slot, ahead


@gluon.jit
def _parts(sums):
    """[_TALL, N] in parts of `_PART` columns."""
    WIDTH: gl.constexpr = sums.shape[1]
    if WIDTH > _PART:
        halves = gl.permute(gl.reshape(sums, [_TALL, 2, WIDTH // 2]), [0, 2, 1])
        low, high = gl.split(halves)
        return _parts(low) + _parts(high)
    else:
        return (gl.convert_layout(sums, _PARTS, assert_trivial=True),)


@gluon.jit
def _finish(
    out,
    residual,
    units,
    steps,
    owners,
    sums,
    first,
    row,
    tokens,
    rows,
    scale,
    EPILOGUE: gl.constexpr,
):
    """Stores a tile: places from `first` on, the weight's rows from `row` on."""
    GATED: gl.constexpr = EPILOGUE == _GATED
    SPREAD: gl.constexpr = _HALF if GATED else _OUT
    WIDTH: gl.constexpr = _PART // 2 if GATED else _PART
    width = rows // 2 if GATED else rows
    place = first + gl.arange(0, _TALL, layout=gl.SliceLayout(1, _PARTS))
    step = gl.load(steps + place, mask=place < tokens, other=0.0)
    place = first + gl.arange(0, _TALL, layout=gl.SliceLayout(1, SPREAD))
    there = place < tokens
    line = gl.load(owners + place, mask=there, other=0).to(gl.int64) * width
    parts = _parts(sums)
    for i in gl.static_range(len(parts)):
        begin = row + i * _PART
        own = begin + gl.arange(0, _PART, layout=gl.SliceLayout(0, _PARTS))
        unit = gl.load(units + own, mask=own < rows, other=0.0)
        values = parts[i].to(gl.float32) * step[:, None] * unit[None, :]
        if GATED:
            gate, up = gl.split(gl.reshape(values, [_TALL, _PART // 2, 2]))
            values = gated(gate, up)
            begin = begin // 2
        column = begin + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, SPREAD))
        at = line[:, None] + column[None, :]
        inside = there[:, None] & (column < width)[None, :]
        if EPILOGUE == _ADDED:
            values = gl.convert_layout(values, SPREAD)
            values += gl.load(residual + at, mask=inside, other=0.0).to(gl.float32)
            values = (values * scale).to(out.dtype.element_ty)
        else:
            # Rounded first: half as much goes through shared memory.
            values = gl.convert_layout((values * scale).to(out.dtype.element_ty), SPREAD)
        gl.store(out + at, values, mask=inside)


@gluon.jit
def _integer_product(
    out,
    codes,
    weight,
    units,
    steps,
    owners,
    marks,
    residual,
    tokens,
    rows,
    columns,
    scale,
    EPILOGUE: gl.constexpr,
):
    ones = gl.load(marks)
    tall = (tokens + _TALL - 1) // _TALL
    tiles = tall * ((rows + _ROWS - 1) // _ROWS)
    left = gl.allocate_shared_memory(gl.int8, [_STAGES, _TALL, _WIDE], _SHARED)
    right = gl.allocate_shared_memory(gl.int8, [_STAGES, _ROWS, _WIDE], _SHARED)
    held = left, right
    tile = gl.program_id(0)
    place, listed, seconds = _tile_at(tile, marks, tokens, columns, tall)
    ahead = tile, gl.to_tensor(0), place, listed, seconds
    for stage in gl.static_range(_STAGES - 2):
        _copy(held, stage, ahead, codes, weight, ones, tokens, rows, columns, tall)
        ahead = _following(ahead, marks, tokens, columns, tall)
    slot = 0
    while tile < tiles:
        sums = gl.zeros([_TALL, _ROWS], gl.int32, _SUMS)
        if seconds > 0:
            sums, slot, ahead = _multiplied(
                *(held, sums, slot, ahead, seconds, codes, weight, marks, ones, tokens),
                *(rows, columns, tall),
            )
            sums *= _SECOND
        sums, slot, ahead = _multiplied(
            *(held, sums, slot, ahead, columns // _WIDE, codes, weight, marks, ones),
            *(tokens, rows, columns, tall),
        )
        first, row = tile % tall * _TALL, tile // tall * _ROWS
        tile = tile + gl.num_programs(0)
        # Of the next tile, before this one's results are written: it takes a while.
        seconds = gl.load(marks + (1 + tile % tall) * (1 + 2 * (columns // _WIDE)))
        _finish(
            *(out, residual, units, steps, owners, sums, first, row, tokens, rows, scale),
            EPILOGUE=EPILOGUE,
        )
    async_copy.wait_group(0)


_kernel = Kernel(
    _integer_product, grid="min(tiles, processors)", multiples_of_16=("rows", "columns")
)


def variants() -> Iterator[Variant]:
    """What the bundle holds."""
    for epilogue in (0, _ADDED.value, _GATED.value):
        added = "*bf16" if epilogue == _ADDED.value else "none"
        types = ("*bf16", "*i8", "*i8", *["*fp32"] * 2, *["*i32"] * 2, added, *["i32"] * 3, "fp32")
        yield Variant(_kernel, types, {"EPILOGUE": epilogue}, WARPS, 1, HOPPER)


def product(
    rows: Digits,
    weight: Tensor,
    units: Tensor,
    out: Tensor,
    residual: Tensor | None,
    scale: float,
    gated: bool,
) -> None:
    """`linear.linear` or `gated_linear` of rows [T, K] and integers [R, K] into `out`.

    Args:
        rows: of activations.
        weight: int8, contiguous, R a multiple of 16.
        units: float32 [R or more], of the weight's rows.
        out: bfloat16 [T, R], or [T, R/2] if `gated`; written.
        residual: bfloat16 [T, R], or None.
        scale: as `linear`.
        gated: rows 2i and 2i + 1 are gate's and up's.
    """
    tokens, height = rows.codes.shape[1], len(weight)
    tiles = -(-tokens // digits.TALL) * -(-height // ROWS)
    _kernel.launch(
        (min(tiles, processors_of(weight.device)),),
        *(out, rows.codes, weight, units, rows.steps, rows.owners, rows.marks, residual),
        *(tokens, height, weight.shape[1], scale),
        constants={"EPILOGUE": epilogue_of(residual, gated)},
        warps=WARPS,
        stages=1,
    )
