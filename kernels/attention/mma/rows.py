"""The rows of a step of decode attention by `mma`: which keys they are, and how they come.

A row is a key's first digit. Keys that have a second one are left out and listed before; behind the
last step of the others come steps with half as many of them, their two digits in rows r and r + 8
of sixteen. If there are too many for the list, all keys are taken so. In a list they are in order,
so that sums do not depend on which thread was faster.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .layouts import COLUMNS, COPY, MMA, PART, WARPS

LISTED = gl.constexpr(512)
"""Keys of a program that a list has room for."""
_SCANNED = gl.constexpr(1024)
"""Keys that are looked at together."""
_SCAN = gl.constexpr(gl.BlockedLayout([8], [32], [WARPS.value], [0]))
_ANGLES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
"""Sixteen angles of a row for each of four threads, as `together` has put them."""


def together(tables: Tensor) -> Tensor:
    """Cosines and sines [positions, 2, pairs] with those next to each other that a thread reads.

    [positions, pairs / 32, cosines and sines, 4 threads, 4, 2], as products' sums lie in registers.
    """
    apart: Tensor = tables.unflatten(2, (-1, 4, 4, 2))
    return apart.permute(0, 2, 1, 4, 3, 5).contiguous()


@gluon.jit
def _sum(a, b):
    return a + b


@gluon.jit
def list_wide(found, tables, second, first, last, kv_heads, kv_head, PAGE: gl.constexpr):
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
        gl.store(found + order - 1, key, mask=wide & (order <= LISTED))
        count += gl.sum(wide.to(gl.int32), 0)
    return count


@gluon.jit
def index_of(step, row, whole, TILE: gl.constexpr):
    """Which of the keys with two rows each the rows of a step belong to."""
    return (step - whole) * (TILE // 2) + row // 16 * 8 + row % 8


@gluon.jit
def key_of(step, row, found, first, whole, count, low, offset, TILE: gl.constexpr):
    """The key of each row of a step, or another one that is seen, where there is none.

    Of `whole` steps each row has a key of its own, from `first` on; after them come `count` keys
    with two rows each: those of the list, or, if there are too many for it, all from `first` on.
    """
    key = first + step * TILE + row
    if step >= whole:
        index = index_of(step, row, whole, TILE)
        key = first + index
        if count <= LISTED:
            key = gl.load(found + index, mask=index < count, other=0)
    return gl.minimum(gl.maximum(key, low), offset)


@gluon.jit
def page_of(tables, key, PAGE: gl.constexpr):
    """int32: where keys are."""
    return gl.load(tables + key // PAGE).to(gl.int32)


@gluon.jit
def about_rows(
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
        place += gl.arange(0, 2 * PART, layout=gl.SliceLayout(0, _ANGLES))[None, :]
        for i in gl.static_range(PAIRS // PART):
            found = found + _turns_of(gl.load(place + 2 * i * PART))
    return more, key_scale, value_scale, found


@gluon.jit
def _turns_of(angles):
    """(cosines, sines), [TILE, 32] each, of angles as `together` puts them."""
    ROWS: gl.constexpr = angles.shape[0]
    apart = gl.permute(gl.reshape(angles, [ROWS, 2, 4, 4, 2]), [0, 3, 2, 4, 1])
    cosines, sines = gl.split(gl.reshape(apart, [ROWS, PART, 2]))
    cosines = gl.convert_layout(cosines, MMA, assert_trivial=True)
    return cosines, gl.convert_layout(sines, MMA, assert_trivial=True)


@gluon.jit
def copy_codes(
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
    byte = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, COPY))[None, :]
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
        for i in gl.static_range(len(buffers)):
            target = buffers[i].index(slot * SIDES + side)
            async_copy.async_copy_global_to_shared(target, place + i * COLUMNS, mask=fits)
    async_copy.commit_group()
