"""One sequence's keys and values written out of their pages, for prefill by a dense attention.

value[h, t] = H (q1 scale1 + q2 scale2) in its own column order, for a plain cache a copy; keys
likewise, or, where values alone are stored, made of the values: with weighted w v, key[i] =
w[i] v[i] cos - w[j] v[j] sin and key[j] = w[j] v[j] cos + w[i] v[i] sin for the pairs that turn.
All in float32, rounded once.

A program takes a few tokens of one head: a warp for each 512 numbers or so, which then stay within
the warp while they are turned. Bytes moved for each number: `bits` / 8 in (twice that with a second
digit) and two out in bfloat16, four where a key is made of it. Attention then reads them once for
all queries of a tile, which is why they are worth writing.

What it gave up: decoding, which reads each key once and should do so where it lies.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from ..launching.variant import ALIGNMENT
from .cache import DTYPES, MOST, NONE, KeyRule, NarrowCache, cache_fault, misfit
from .store import SHIPPED, constants_of, own_column, turn

_NONE = tl.constexpr(NONE)
_WARPS = 1


@triton.jit
def _numbers(codes, scales, line, stored, column, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """A digit times its scale, float32 [tokens, columns]; zero where it is not `stored`."""
    WIDTH: tl.constexpr = HEAD_DIM * BITS // 8
    there = stored[:, None] & (column < HEAD_DIM)[None, :]
    byte = line[:, None] * WIDTH + (column % WIDTH)[None, :]
    code = tl.load(codes + byte, mask=there, other=0).to(tl.int32)
    # Up to the sign bit, and back with it.
    high = 24
    if BITS == 4:
        high = (28 - column // WIDTH * 4)[None, :]
    whole = (code << high) >> (32 - BITS)
    scale = tl.load(scales + line, mask=stored, other=0.0).to(tl.float32)
    return whole.to(tl.float32) * scale[:, None]


@triton.jit
def _other_of_pair(values, column, PAIRS: tl.constexpr, TURNS: tl.constexpr):
    """[tokens, columns] in stored order, with the two numbers of each pair exchanged."""
    TOKENS: tl.constexpr = values.shape[0]
    SIZE: tl.constexpr = values.shape[1]
    if 2 * PAIRS == 1 << TURNS:
        halves = tl.reshape(values, [TOKENS, SIZE // (2 * PAIRS), 2, PAIRS])
        low, high = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        return tl.reshape(tl.permute(tl.join(high, low), (0, 1, 3, 2)), [TOKENS, SIZE])
    else:
        other = tl.where(column < PAIRS, column + PAIRS, column - PAIRS)
        other = tl.where(column < 2 * PAIRS, other, column)
        return tl.gather(values, tl.zeros([TOKENS, SIZE], tl.int32) + other[None, :], 1)


@triton.jit
def _gather(
    out_key,
    out_value,
    codes,
    scales,
    second,
    pool_codes,
    pool_scales,
    tables,
    weight,
    cosines,
    sines,
    length,
    room,
    kv_heads,
    page_size,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    TURNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    SIDES: tl.constexpr = 2 if PAIRS < 0 else 1
    SIZE: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    within = token < length
    head = tl.program_id(1).to(tl.int64)
    page = tl.load(tables + token // page_size, mask=within, other=0)
    place = token % page_size
    row = tl.load(second + (page * kv_heads + head) * page_size + place, within, _NONE)
    has = row != _NONE
    column = tl.arange(0, SIZE)
    own = own_column(HEAD_DIM, PAIRS, SIZE)
    to = token[:, None] * HEAD_DIM + own[None, :]
    fits = within[:, None] & (own < HEAD_DIM)[None, :]
    for side in tl.static_range(SIDES):
        line = ((page * SIDES + side) * kv_heads + head) * page_size + place
        numbers = _numbers(codes, scales, line, within, column, HEAD_DIM, BITS)
        line = row.to(tl.int64) * SIDES + side
        numbers += _numbers(pool_codes, pool_scales, line, has, column, HEAD_DIM, BITS)
        numbers = turn(numbers, TURNS)
        if side < SIDES - 1:
            at = out_key + head * room * HEAD_DIM + to
        else:
            at = out_value + head * room * HEAD_DIM + to
        tl.store(at, numbers.to(out_value.dtype.element_ty), mask=fits)
    if SIDES == 1:
        numbers *= tl.load(weight + own, mask=own < HEAD_DIM, other=0.0)[None, :]
        if PAIRS > 0:
            turns = within[:, None] & (column < 2 * PAIRS)[None, :]
            angle = token[:, None] * PAIRS + (column % PAIRS)[None, :]
            cosine = tl.load(cosines + angle, mask=turns, other=1.0)
            sine = tl.load(sines + angle, mask=turns, other=0.0)
            sine = tl.where((column < PAIRS)[None, :], -sine, sine)
            other = _other_of_pair(numbers, column, PAIRS, TURNS)
            numbers = numbers * cosine + other * sine
        at = out_key + head * room * HEAD_DIM + to
        tl.store(at, numbers.to(out_key.dtype.element_ty), mask=fits)


@triton.jit
def _copy(
    out_key,
    out_value,
    keys,
    values,
    tables,
    length,
    room,
    page_size,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    within = token < length
    head = tl.program_id(1).to(tl.int64)
    page = tl.load(tables + token // page_size, mask=within, other=0)
    line = (page * page_size + token % page_size) * tl.num_programs(1) + head
    column = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    fits = within[:, None] & (column < HEAD_DIM)
    at = line[:, None] * HEAD_DIM + column
    to = token[:, None] * HEAD_DIM + column
    key = tl.load(keys + at, mask=fits).to(out_key.dtype.element_ty)
    tl.store(out_key + head * room * HEAD_DIM + to, key, mask=fits)
    value = tl.load(values + at, mask=fits).to(out_value.dtype.element_ty)
    tl.store(out_value + head * room * HEAD_DIM + to, value, mask=fits)


_GRID = "cdiv(length, TOKENS), kv_heads"
_gathered = Kernel(_gather, name="kv_gather", grid=_GRID)
_copied = Kernel(_copy, name="kv_copy", grid=_GRID)


def _tokens(head_dim: int) -> int:
    """Of a program: as many as make 512 numbers, but few where heads are tiny."""
    return min(MOST >> (head_dim - 1).bit_length(), 8)


def variants() -> Iterator[Variant]:
    """What the bundle holds: what `store` writes, and plain caches, from and to bfloat16."""
    for format in SHIPPED:
        rule = ("none" if format.pairs is None else "*fp32",) * 3
        types = (*("*bf16", "*bf16", "*u8", "*bf16", "*i32", "*u8", "*bf16", "*i64"), *rule)
        constants = {**constants_of(format), "TOKENS": _tokens(format.head_dim)}
        yield Variant(_gathered, (*types, *["i32"] * 4), constants, warps=_WARPS)
    for head_dim in sorted({format.head_dim for format in SHIPPED}):
        constants = {"HEAD_DIM": head_dim, "TOKENS": _tokens(head_dim)}
        yield Variant(_copied, (*["*bf16"] * 4, "*i64", *["i32"] * 3), constants, warps=_WARPS)


def gather(
    cache: NarrowCache | tuple[Tensor, Tensor],
    tables: Tensor,
    length: int,
    rule: KeyRule | None,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    """As `reference.gather`, whose arguments it has.

    All tensors are contiguous; outputs, and the tensors of a plain cache, are bfloat16, float16 or
    float32 of one shape and dtype. KernelInputError for anything else, before anything is written.
    """
    if isinstance(cache, NarrowCache):
        heads, head_dim, page_size = cache.format.kv_heads, cache.format.head_dim, cache.page_size
        fault, device = cache_fault(cache, rule), cache.codes.device
    else:
        _, page_size, heads, head_dim = cache[0].shape if cache[0].dim() == 4 else (0, 0, 0, 0)
        fault, device = _plain_fault(*cache, rule), cache[0].device
    room = out_value.shape[1] if out_value.dim() == 3 else 0
    dtype = out_value.dtype if out_value.dtype in DTYPES else torch.bfloat16
    fault = fault or misfit(
        device,
        ("tables", tables, torch.int64, (tables.numel(),)),
        ("out_value", out_value, dtype, (heads, room, head_dim)),
        ("out_key", out_key, dtype, (heads, room, head_dim)),
    )
    positions = length if rule is None else len(rule.cosines)
    if not fault and not 0 <= length <= min(len(tables) * page_size, room, positions):
        fault = (
            f"{length} tokens do not fit {len(tables)} pages of {page_size}, {room} places of the "
            f"output and {positions} positions"
        )
    if fault:
        raise KernelInputError(f"gathering keys and values: {fault}")
    if tables.data_ptr() % ALIGNMENT:
        tables = tables.clone()  # a row of a batch's table begins anywhere
    tokens = _tokens(head_dim)
    grid = (-(-length // tokens), heads)
    if isinstance(cache, NarrowCache):
        pool = cache.overflow
        made = (None,) * 3 if rule is None else (rule.weight, rule.cosines, rule.sines)
        _gathered.launch(
            grid,
            *(out_key, out_value, cache.codes, cache.scales, cache.second, pool.codes, pool.scales),
            *(tables, *made, length, room, heads, page_size),
            constants={**constants_of(cache.format), "TOKENS": tokens},
            warps=_WARPS,
        )
    else:
        constants = {"HEAD_DIM": head_dim, "TOKENS": tokens}
        sizes = (length, room, page_size)
        _copied.launch(
            grid, out_key, out_value, *cache, tables, *sizes, constants=constants, warps=_WARPS
        )


def _plain_fault(keys: Tensor, values: Tensor, rule: KeyRule | None) -> str:
    """What is wrong with the tensors of a plain cache, or nothing."""
    if rule is not None:
        return "a plain cache holds the keys; it takes no rule"
    if keys.dim() != 4 or keys.dtype not in DTYPES or keys.shape[3] > MOST:
        return (
            f"keys are {keys.dtype} {tuple(keys.shape)}; not bfloat16, float16 or float32 "
            f"[pages, page_size, kv_heads, head_dim up to {MOST}]"
        )
    device, dtype, shape = keys.device, keys.dtype, keys.shape
    return misfit(device, ("keys", keys, dtype, shape), ("values", values, dtype, shape))
