"""What is before and after decode attention: the query is turned, the splits' sums are joined.

Over narrow keys a query is turned as they are (`cache.turned`), q', and cut into two digits:
q' = f (q1 + q2 / 254), whole numbers of -127 to 127, so that products with codes are exact sums of
integers; what is off is 2^-16 of the largest number at most. Where keys are made of values, q' is
that of q times k_norm's weight, and zero in the columns that RoPE turns; the query's own numbers of
these are given beside it in float16, with a power of two taken out.

Splits of a sequence's keys leave sums under a maximum each (flash decoding, Dao et al. 2023). They
are added in their order, divided, and turned back.

A program has one head of one sequence, as [blocks, R, C]: a Hadamard matrix of R C numbers is the
product of one of R and one of C, which takes R + C additions a number. `turn_query` reads D numbers
and writes two bytes for each; `join_splits` reads splits (D + 2) float32, and writes D numbers.
"""

from functools import lru_cache

import triton
import triton.language as tl

from ..launching.launch import Kernel
from ..launching.overlap import wait_in_turn

DIGIT = tl.constexpr(254.0)
"""Second digits of a query count one in this."""
LOG2E = tl.constexpr(1.4426950408889634)
MOST_SPLITS = 128
_START = 96
"""Keys that a program could read in the time that it needs to start and to end."""


@triton.jit
def sign(row, column):
    """The entry of a Hadamard matrix times the root of its size, 1 or -1 (int32)."""
    bits = row & column
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1 - 2 * (bits & 1)


@triton.jit
def _turned(x, BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Blocks [BLOCKS, R, C] times their Hadamard matrices."""
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    rows = sign(r[:, None], r[None, :]).to(tl.float32)
    x = tl.sum(rows[None, :, :, None] * x[:, None, :, :], 2)
    columns = sign(c[:, None], c[None, :]).to(tl.float32)
    x = tl.sum(columns[None, None, :, :] * x[:, :, None, :], 3)
    return x / tl.sqrt(R * C * 1.0)


@triton.jit
def _places(BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Stored columns of [BLOCKS, R, C]."""
    block = tl.arange(0, BLOCKS)[:, None, None]
    return (block * R + tl.arange(0, R)[None, :, None]) * C + tl.arange(0, C)[None, None, :]


@triton.jit
def _sources(stored, DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Which numbers of a head are stored in these columns (`KVFormat.order`)."""
    HALF: tl.constexpr = DIM // 2
    seconds = tl.where(stored < 2 * PAIRS, stored - PAIRS + HALF, stored - PAIRS)
    found = tl.where(stored < PAIRS, stored, seconds)
    return tl.where(stored < HALF + PAIRS, found, stored)


@triton.jit
def _turn_query(
    digits,
    own,
    factors,
    query,
    weight,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_in_turn(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    stored = _places(BLOCKS, R, C)
    source = _sources(stored, DIM, PAIRS)
    x = tl.load(query + head * DIM + source, mask=stored < DIM, other=0.0).to(tl.float32)
    if PAIRS > 0:
        mine = tl.where(stored < 2 * PAIRS, x, 0.0)
        largest = tl.max(tl.max(tl.max(tl.abs(mine), 2), 1), 0)
        unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(unit > 0, unit, 1.0)
        place = own + head * (2 * PAIRS) + stored
        tl.store(place, (mine / unit).to(tl.float16), mask=stored < 2 * PAIRS)
        # Keys come as sums of codes divided by the block's size, see `decode`.
        tl.store(factors + head * 2 + 1, unit * LOG2E * tl.sqrt(R * C * 1.0))
    if weight is not None:
        x *= tl.load(weight + source, mask=stored < DIM, other=0.0)
    x = tl.where((stored >= 2 * PAIRS) & (stored < DIM), _turned(x, BLOCKS, R, C), 0.0)
    largest = tl.max(tl.max(tl.max(tl.abs(x), 2), 1), 0)
    factor = tl.where(largest > 0, largest / 127, 1.0)
    x = x / factor
    first = tl.floor(x + 0.5)
    second = tl.minimum(tl.maximum(tl.floor((x - first) * DIGIT + 0.5), -127), 127)
    place = digits + head * (2 * DIM) + stored
    tl.store(place, first.to(tl.int8), mask=stored < DIM)
    tl.store(place + DIM, second.to(tl.int8), mask=stored < DIM)
    tl.store(factors + head * 2, factor * LOG2E)


@triton.jit
def leave(sums, head, group, total, column, inside, DIM: tl.constexpr):
    """Stores some columns of a split's sums, [ROWS, columns], of `group` heads from `head` on."""
    row = tl.arange(0, total.shape[0])
    place = (head + row) * tl.num_programs(1) + tl.program_id(1)
    here = (row < group)[:, None] & inside[None, :]
    tl.store(sums + place[:, None] * DIM + column[None, :], total, mask=here)


@triton.jit
def leave_marks(marks, head, group, largest, share):
    """Stores the maximum that a split's sums stand under, and their share, [ROWS] each."""
    row = tl.arange(0, largest.shape[0])
    place = marks + ((head + row) * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(place, largest, mask=row < group)
    tl.store(place + 1, share, mask=row < group)


@triton.jit
def _join_splits(
    out,
    sums,
    marks,
    splits,
    unit,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    TURNED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if TURNED:  # over narrow pages, where it is not measured whether later is better
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
    else:
        wait_in_turn(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    stored = _places(BLOCKS, R, C)
    part = tl.arange(0, AT_ONCE)
    sums += head * splits * DIM
    marks += head * splits * 2
    largest = tl.full([1], -float("inf"), tl.float32)
    share = tl.zeros([1], tl.float32)
    total = tl.zeros([BLOCKS, R, C], tl.float32)
    for first in range(0, splits, AT_ONCE):
        there = first + part < splits
        own = tl.load(marks + (first + part) * 2, mask=there, other=-float("inf"))
        shares = tl.load(marks + (first + part) * 2 + 1, mask=there, other=0.0)
        inside = there[:, None, None, None] & (stored < DIM)[None]
        place = (first + part)[:, None, None, None] * DIM + stored[None]
        parts = tl.load(sums + place, mask=inside, other=0.0)
        new = tl.maximum(largest, tl.max(own, 0))
        old = tl.exp2(largest - new)
        weights = tl.exp2(own - new)
        share = share * old + tl.sum(weights * shares, 0)
        total = total * old[:, None, None] + tl.sum(weights[:, None, None, None] * parts, 0)
        largest = new
    total *= (unit / share)[:, None, None]
    if TURNED:
        total = _turned(total, BLOCKS, R, C)
    place = out + head * DIM + _sources(stored, DIM, PAIRS)
    tl.store(place, total.to(out.dtype.element_ty), mask=stored < DIM)


turn_query = Kernel(_turn_query, grid="B * heads")
join_splits = Kernel(_join_splits, grid="B * heads")


def shape_of(head_dim: int, block: int) -> dict[str, int]:
    """BLOCKS, R and C of heads whose Hadamard matrices have `block` rows."""
    columns = 1 << (block.bit_length() // 2)
    return {
        "BLOCKS": 1 << (head_dim // block - 1).bit_length(),
        "R": block // columns,
        "C": columns,
    }


@lru_cache(maxsize=4096)
def splits_of(slots: int, units: int, keys: int, room: int, tile: int) -> int:
    """Programs that share the `keys` of each of `units` (sequence, key head).

    `slots` programs run at the same time, and `room` is the most. The fewest rounds of programs
    count, times what each has to do, in steps of `tile` keys.
    """
    tiles = -(-keys // tile)

    def time(splits: int) -> int:
        return -(-units * splits // slots) * (-(-tiles // splits) * tile + _START)

    return min(range(1, max(1, min(room, MOST_SPLITS, keys // 64)) + 1), key=time)
