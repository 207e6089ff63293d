"""Writing a paged cache of narrow numbers: one pass over the new tokens, and giving rows back.

A program takes one head of one token. It turns the key and the value (x' = H x by butterflies:
additions of float32 alone, log2 of a block's size for each number), rounds them to a first digit
under the smallest bfloat16 scale that fits, and measures what was lost: ||x' - scale q|| / ||x'||,
which is ||x - stored|| / ||x|| because H is orthogonal. Where keys are made of values, also for
||w (v - stored)|| / ||w v||, the key's: RoPE keeps lengths. Only a head that lost more than the
token allows takes a row of the pool and writes a second digit there. A row is taken by one atomic
subtraction; whoever finds none left adds it back, so that the count ends as it should. Programs of
tokens without a slot (the padding of a recorded step) leave before they write anything.

Bytes moved for a head and side: two for each number in, `bits` / 8 out, and 4 + 2 out for the row
and the scale; a second digit adds as many out again. Nothing is written twice, and no head waits
for another.

What it gave up: rows of the pool are in no fixed order, which nobody reads; and one warp for each
head keeps every sum within a warp, where several heads would share the cost of starting it.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from .cache import (
    _LEAST_SCALE,
    _SCALE_SLACK,
    DTYPES,
    NONE,
    STRICT,
    KeyRule,
    KVFormat,
    NarrowCache,
    Overflow,
    cache_fault,
    misfit,
)

SHIPPED = tuple(
    KVFormat(1, head_dim, 8, pairs)
    for head_dim, pairs in ((256, None), (512, 64), (64, None), (128, 16), (128, None))
)
"""What the bundle holds; the number of heads is an argument."""
_NONE = tl.constexpr(NONE)
_SLACK = tl.constexpr(_SCALE_SLACK)
_LEAST = tl.constexpr(_LEAST_SCALE)
_RELEASED = 256
"""Places of a page that are looked at together."""


@triton.jit
def own_column(HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, SIZE: tl.constexpr):
    """`KVFormat.order` for columns up to SIZE: where a stored column was before."""
    column = tl.arange(0, SIZE)
    if PAIRS > 0:
        HALF: tl.constexpr = HEAD_DIM // 2
        second = tl.where(column < 2 * PAIRS, column + (HALF - PAIRS), column - PAIRS)
        moved = (column >= PAIRS) & (column < HALF + PAIRS)
        column = tl.where(moved, second, column)
    return column


@triton.jit
def turn(vectors, TURNS: tl.constexpr):
    """Each 2^TURNS neighbours of [rows, columns] times the Hadamard matrix, in float32.

    A step takes the highest bit of the place, makes sum and difference over it, and makes it the
    lowest bit. After all steps every bit is where it was.
    """
    BLOCK: tl.constexpr = 1 << TURNS
    BLOCKS: tl.constexpr = vectors.numel // BLOCK
    parts = vectors
    for _ in tl.static_range(TURNS):
        halves = tl.reshape(parts, [BLOCKS, 2, BLOCK // 2])
        low, high = tl.split(tl.permute(halves, (0, 2, 1)))
        parts = tl.reshape(tl.join(low + high, low - high), [BLOCKS, BLOCK])
    return tl.reshape(parts, vectors.shape) * (BLOCK**-0.5)


@triton.jit
def _largest(values, AXIS: tl.constexpr):
    """The largest magnitude, NaN if there is one: bits of magnitudes are ordered as integers."""
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nearest_bfloat16(values):
    """Float32 that is not negative, rounded to even as a bfloat16 holds it; finite ones only."""
    bits = values.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _digit(exact, BITS: tl.constexpr):
    """Integers (as float32) and scales of vectors [sides, columns], and what they leave over.

    The scale of a vector that is not finite is NaN, and so is what is left.
    """
    LIMIT: tl.constexpr = (1 << (BITS - 1)) - 1
    largest = _largest(exact, 1)
    needed = tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32))
    scale = _nearest_bfloat16(needed)
    scale = _nearest_bfloat16(tl.where(scale < needed, needed * _SLACK, needed))
    scale = tl.where(needed < float("inf"), tl.maximum(scale, _LEAST), float("nan"))
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    # Adding 1.5 * 2^23 leaves no bits for a fraction: rounds to even.
    codes = (exact * inverse[:, None] + 12582912.0) - 12582912.0
    codes = tl.minimum(tl.maximum(codes, -LIMIT), LIMIT)
    return codes, scale, exact - codes * scale[:, None]


@triton.jit
def _length(vectors):
    return tl.sqrt(tl.sum(vectors * vectors, 1))


@triton.jit
def _error(left, whole):
    """The largest relative error of the sides; NaN if one is.

    Both times a power of two first, which brings the largest of `whole` to at least 1 and below 4
    (denormals lower): squares of 1e-22 and of 1e20 are 0 and infinity.
    """
    exponent = _largest(whole, 1).to(tl.int32, bitcast=True) >> 23
    unit = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)[:, None]
    return _largest(_length(left * unit) / tl.maximum(_length(whole * unit), 1e-30), 0)


@triton.jit
def _error_of_both(left, exact, own, weight, TURNS: tl.constexpr):
    """Of the value, and of the key that is made of it."""
    missing = turn(left, TURNS) * weight[None, :]
    error = _error(left, exact).to(tl.int32, bitcast=True)
    made = _error(missing, own * weight[None, :]).to(tl.int32, bitcast=True)
    return tl.maximum(error, made).to(tl.float32, bitcast=True)


@triton.jit
def _write(place, codes, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """Stores the digits [sides, columns] at pointers [sides, 1] to their first bytes."""
    SIDES: tl.constexpr = codes.shape[0]
    SIZE: tl.constexpr = codes.shape[1]
    WIDTH: tl.constexpr = HEAD_DIM * BITS // 8
    BYTES: tl.constexpr = WIDTH if SIZE == HEAD_DIM else SIZE
    whole = codes.to(tl.int32)
    if BITS == 4 and SIZE == HEAD_DIM:
        low, high = tl.split(tl.permute(tl.reshape(whole, [SIDES, 2, WIDTH]), (0, 2, 1)))
        whole = (low & 15) | (high << 4)
    elif BITS == 4:
        other = (tl.arange(0, SIZE)[None, :] + WIDTH) % SIZE
        other = tl.gather(whole, tl.zeros([SIDES, SIZE], tl.int32) + other, 1)
        whole = (whole & 15) | (other << 4)
    byte = tl.arange(0, BYTES)[None, :]
    tl.store(place + byte, whole.to(tl.uint8), mask=byte < WIDTH)


@triton.jit
def _store(
    value,
    key,
    codes,
    scales,
    second,
    pool_codes,
    pool_scales,
    free,
    count,
    tally,
    largest,
    failed,
    slots,
    limits,
    weight,
    kv_heads,
    page_size,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    TURNS: tl.constexpr,
):
    SIDES: tl.constexpr = 2 if PAIRS < 0 else 1
    SIZE: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    WIDTH: tl.constexpr = HEAD_DIM * BITS // 8
    token = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    side = tl.arange(0, SIDES)
    column = own_column(HEAD_DIM, PAIRS, SIZE)
    there = column < HEAD_DIM
    at = tl.program_id(0).to(tl.int64) * HEAD_DIM + column[None, :] + 0 * side[:, None]
    if SIDES == 2:
        own = tl.load(key + at, mask=there[None, :] & (side == 0)[:, None], other=0.0)
        values = tl.load(value + at, mask=there[None, :] & (side == 1)[:, None], other=0.0)
        own = tl.where((side == 0)[:, None], own, values).to(tl.float32)
    else:
        own = tl.load(value + at, mask=there[None, :], other=0.0).to(tl.float32)
        weights = tl.load(weight + column, mask=there, other=0.0)
    limit = tl.load(limits + token)
    slot = tl.load(slots + token)
    if tl.program_id(0) == 0:
        tl.atomic_add(tally, tl.num_programs(0), sem="relaxed")
    if slot < 0:
        # One of a token takes back what was counted for all of its heads.
        if head == 0:
            tl.atomic_add(tally, -kv_heads, sem="relaxed")
        return

    exact = turn(own, TURNS)
    digits, scale, left = _digit(exact, BITS)
    if SIDES == 2:
        error = _error(left, exact)
    else:
        error = _error_of_both(left, exact, own, weights, TURNS)

    page = slot // page_size
    place = slot % page_size
    line = ((page * SIDES + side) * kv_heads + head) * page_size + place
    _write(codes + line[:, None] * WIDTH, digits, HEAD_DIM, BITS)
    tl.store(scales + line, scale.to(tl.bfloat16))

    row = tl.full([], _NONE, tl.int32)
    # As "not within", so that an error that is no number counts as too large.
    if (error <= limit) == 0:
        free_rows = tl.atomic_add(count, -1, sem="relaxed")
        if free_rows <= 0:
            tl.atomic_add(count, 1, sem="relaxed")
        else:
            row = tl.load(free + free_rows - 1)
            tl.atomic_add(tally + 1, 1, sem="relaxed")
            digits, scale, left = _digit(left, BITS)
            if SIDES == 2:
                error = _error(left, exact)
            else:
                error = _error_of_both(left, exact, own, weights, TURNS)
            line = row.to(tl.int64) * SIDES + side
            _write(pool_codes + line[:, None] * WIDTH, digits, HEAD_DIM, BITS)
            tl.store(pool_scales + line, scale.to(tl.bfloat16))
        if (error <= limit) == 0:
            tl.store(failed + token, 1)
    tl.store(second + (page * kv_heads + head) * page_size + place, row)

    # Most are below the largest so far: looking first spares nearly all of them the atomic.
    bits = error.to(tl.int32, bitcast=True)
    if (bits < 0x7F800000) & (bits > tl.load(largest)):
        tl.atomic_max(largest, bits, sem="relaxed")


@triton.jit
def _release(second, free, count, pages, all_pages, places, BLOCK: tl.constexpr):
    page = tl.program_id(1) * all_pages.to(tl.int64) + tl.load(pages + tl.program_id(0))
    for first in range(0, places, BLOCK):
        place = first + tl.arange(0, BLOCK)
        at = second + page * places + place
        row = tl.load(at, mask=place < places, other=_NONE)
        held = (row != _NONE).to(tl.int32)
        number = tl.sum(held, 0)
        if number > 0:
            begin = tl.atomic_add(count, number, sem="relaxed")
            tl.store(free + begin + tl.cumsum(held, 0) - 1, row, mask=held > 0)
            tl.store(at, tl.full([BLOCK], _NONE, tl.int32), mask=held > 0)


_stored = Kernel(_store, name="kv_store", grid="tokens * kv_heads")
_released = Kernel(_release, name="kv_release", grid="pages, layers")


def constants_of(format: KVFormat) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {
        "HEAD_DIM": format.head_dim,
        "BITS": format.bits,
        "PAIRS": -1 if format.pairs is None else format.pairs,
        "TURNS": format.block.bit_length() - 1,
    }


def variants() -> Iterator[Variant]:
    """What the bundle holds: the layers of Gemma 4 and of small models, in bfloat16."""
    for format in SHIPPED:
        both = format.pairs is None
        types = (
            *("*bf16", "*bf16" if both else "none", "*u8", "*bf16", "*i32"),
            *("*u8", "*bf16", "*i32", "*i32", "*i64", "*i32", "*u8", "*i64", "*fp32"),
            *("none" if both else "*fp32", "i32", "i32"),
        )
        yield Variant(_stored, types, constants_of(format), warps=1)
    pages = ("*i32", "*i32", "*i32", "*i64", "i32", "i32")
    yield Variant(_released, pages, {"BLOCK": _RELEASED})


def store(
    key: Tensor | None,
    value: Tensor,
    cache: NarrowCache,
    slots: Tensor,
    limits: Tensor,
    failed: Tensor,
    rule: KeyRule | None = None,
) -> None:
    """As `reference.store`, whose arguments it has; rows of the pool are taken in any order.

    Nothing is stored of a token whose slot is negative, and nothing counted.
    `key` and `value` are bfloat16, float16 or float32 of one dtype; all tensors are contiguous.
    KernelInputError for anything else, before anything is written.
    """
    format, tokens = cache.format, len(value)
    shape = (tokens, format.kv_heads, format.head_dim)
    dtype = value.dtype if value.dtype in DTYPES else torch.bfloat16
    fault = cache_fault(cache, rule) or misfit(
        cache.codes.device,
        ("value", value, dtype, shape),
        ("slots", slots, torch.int64, (tokens,)),
        ("limits", limits, torch.float32, (tokens,)),
        ("failed", failed, torch.bool, (tokens,)),
        *([] if key is None else [("key", key, dtype, shape)]),
    )
    if (key is None) != (format.pairs is not None):
        fault = "it takes a key, unless keys are made of values"
    if fault:
        raise KernelInputError(f"storing keys and values: {fault}")
    pool = cache.overflow
    _stored.launch(
        (tokens * format.kv_heads,),
        *(value, key, cache.codes, cache.scales, cache.second),
        *(pool.codes, pool.scales, pool.free, pool.count),
        *(cache.tally, cache.largest.view(torch.int32), failed.view(torch.uint8), slots),
        limits * STRICT,
        *(None if rule is None else rule.weight, format.kv_heads, cache.page_size),
        constants=constants_of(format),
        warps=1,
    )


def release(second: Tensor, overflow: Overflow, pages: Tensor) -> None:
    """As `reference.release`; before the stream writes any of these pages again.

    Args:
        second: int32 [layers, pages, kv_heads, page_size].
        overflow: the layers' pool.
        pages: int64 [n], all different.

    KernelInputError for other tensors, before anything is given back.
    """
    fault = misfit(
        second.device,
        ("second", second, torch.int32, second.shape),
        ("free", overflow.free, torch.int32, overflow.scales.shape[:1]),
        ("count", overflow.count, torch.int32, (1,)),
        ("pages", pages, torch.int64, (pages.numel(),)),
    )
    if second.dim() != 4:
        fault = f"second is {tuple(second.shape)}, not [layers, pages, kv_heads, page_size]"
    if fault:
        raise KernelInputError(f"giving rows back: {fault}")
    layers, all_pages, heads, page_size = second.shape
    _released.launch(
        (len(pages), layers),
        *(second, overflow.free, overflow.count, pages, all_pages, heads * page_size),
        constants={"BLOCK": _RELEASED},
    )
