"""Ranks back into positions on a card: `ranks.decode` as one kernel.

A program takes 16 groups of 128 rows, a thread four words of four rows each: it reads 16 adjacent
bytes of the widest plane, looks the 16 ranks up in a table of 4 C(16, N) bytes (17 KB at N = 5, so
that it stays in the first cache) and writes 16 adjacent bytes of each slot. Bytes moved for a row
of a group: (4 N + B) / 8 in, N out; at N = 5 4.1 and 5.

What it gave up: computing positions without a table, some 150 instructions instead of one load.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import SHIPPED, TILE
from ..launching.launch import Kernel, Variant
from . import ranks
from .ranks import MOST_KEPT, RankCode

_GROUPS, _WARPS = 16, 4
_WORDS = tl.constexpr(TILE // 4)
"""Words of four rows in a slot."""


@triton.jit
def _plane(coded, word, inside, WIDTH: tl.constexpr):
    """The bits of four rows each, side by side, for words by their number among all groups."""
    if WIDTH == 8:
        place = coded.to(tl.pointer_type(tl.int32), bitcast=True) + word
        return tl.load(place, mask=inside, other=0)
    elif WIDTH == 4:
        place = coded.to(tl.pointer_type(tl.int16), bitcast=True) + word
        return tl.load(place, mask=inside, other=0).to(tl.int32)
    elif WIDTH == 2:
        return tl.load(coded + word, mask=inside, other=0).to(tl.int32)
    else:
        bits = tl.load(coded + word // 2, mask=inside, other=0).to(tl.int32)
        return bits >> (word % 2 * 4)


@triton.jit
def _row(bits, rank, ROW: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    """The rank of one of four rows with its bits of a plane."""
    return rank | (((bits >> ROW * WIDTH) & ((1 << WIDTH) - 1)) << SHIFT)


@triton.jit
def _slot(way, ROW: tl.constexpr, SLOT: tl.constexpr, VALUED: tl.constexpr):
    """A row's position, or its pair of positions, at its byte of a word."""
    EACH: tl.constexpr = 4 if VALUED else 8
    return ((way >> SLOT * EACH) & ((1 << EACH) - 1)) << 8 * ROW


@triton.jit
def _unrank(
    out,
    coded,
    table,
    groups,
    KEPT: tl.constexpr,
    BITS: tl.constexpr,
    VALUED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    SLOTS: tl.constexpr = KEPT if VALUED else (KEPT + 1) // 2
    first = tl.program_id(0).to(tl.int64) * GROUPS
    count = groups.to(tl.int64)
    word = tl.arange(0, GROUPS * _WORDS)
    group = word // _WORDS
    inside = group < groups - first
    values = coded.to(tl.pointer_type(tl.int16), bitcast=True) + first * (KEPT * _WORDS)
    values += group * (KEPT * _WORDS) + word % _WORDS
    if VALUED:
        coded += count * (2 * KEPT * _WORDS)
    zero = tl.zeros([GROUPS * _WORDS], tl.int32)
    rank0, rank1, rank2, rank3 = zero, zero, zero, zero
    for step in tl.static_range(4):
        if BITS & (8 >> step):
            bits = _plane(coded + first * (128 >> step), word, inside, 8 >> step)
            rank0 = _row(bits, rank0, 0, 8 >> step, BITS & (16 - (16 >> step)))
            rank1 = _row(bits, rank1, 1, 8 >> step, BITS & (16 - (16 >> step)))
            rank2 = _row(bits, rank2, 2, 8 >> step, BITS & (16 - (16 >> step)))
            rank3 = _row(bits, rank3, 3, 8 >> step, BITS & (16 - (16 >> step)))
            coded += count * (128 >> step)
    way0, way1 = tl.load(table + rank0), tl.load(table + rank1)
    way2, way3 = tl.load(table + rank2), tl.load(table + rank3)
    place = out.to(tl.pointer_type(tl.int32), bitcast=True) + first * (SLOTS * _WORDS)
    place += group * (SLOTS * _WORDS) + word % _WORDS
    for slot in tl.static_range(SLOTS):
        decoded = _slot(way0, 0, slot, VALUED) | _slot(way1, 1, slot, VALUED)
        decoded |= _slot(way2, 2, slot, VALUED) | _slot(way3, 3, slot, VALUED)
        if VALUED:
            pairs = tl.load(values + slot * _WORDS, mask=inside, other=0).to(tl.int32)
            decoded |= ((pairs << 4) & 0xF0F0) | ((pairs & 0xF0F0) << 16)
        tl.store(place + slot * _WORDS, decoded, mask=inside)


_kernel = Kernel(_unrank, grid="cdiv(groups, GROUPS)")
_tables: dict[tuple[int, torch.device], Tensor] = {}


def _constants(kept: int, valued: bool) -> dict[str, int | bool]:
    bits = RankCode(kept, 1, valued).bits
    return {"KEPT": kept, "BITS": bits, "VALUED": valued, "GROUPS": _GROUPS}


def variants() -> Iterator[Variant]:
    """What the bundle holds: the sparse formats that come compiled."""
    usual = {(each.kept, each.bits == 4) for each in SHIPPED if each.kept <= MOST_KEPT}
    for kept, valued in sorted(usual):
        types = ("*u8", "*u8", "*i32", "i32")
        yield Variant(_kernel, types, _constants(kept, valued), _WARPS, 1)


def _table(kept: int, device: torch.device) -> Tensor:
    """`ranks.nibbles` on a device; the first call copies it there, which no CUDA graph may hold."""
    if (kept, device) not in _tables:
        _tables[kept, device] = ranks.nibbles(kept).to(device)
    return _tables[kept, device]


def unrank(code: RankCode, coded: Tensor, out: Tensor) -> None:
    """As `ranks.decode`; both tensors on a card, at multiples of 16 bytes."""
    _kernel.launch(
        (-(-code.groups // _GROUPS),),
        *(out, coded, _table(code.kept, out.device), code.groups),
        constants=_constants(code.kept, code.valued),
        warps=_WARPS,
        stages=1,
    )
