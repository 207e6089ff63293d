"""Attention over a cache of narrow numbers in plain torch: the truth, and what runs on a CPU.

A kernel has the name and the signature of its reference. What this file gave up is bandwidth: all
keys and values that are read are written out in float32 before they are multiplied.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference import Pages
from .cache import (
    _LEAST_SCALE,
    _SCALE_SLACK,
    NONE,
    STRICT,
    KeyRule,
    KVFormat,
    NarrowCache,
    Overflow,
    turned,
    turned_back,
)


def store(
    key: Tensor | None,
    value: Tensor,
    cache: NarrowCache,
    slots: Tensor,
    limits: Tensor,
    failed: Tensor,
    rule: KeyRule | None = None,
) -> None:
    """Stores T tokens, each head of each as narrow as its error may be.

    The error of a head's vector is ||x - stored|| / ||x||; no key's and no value's is above the
    token's limit, or the token is marked. A head's key and value get a second digit together. A key
    that is made of its value has the error that its value gives it.

    Args:
        key: [T, kv_heads, head_dim], or None where keys are made of values.
        value: [T, kv_heads, head_dim], any floating dtype.
        cache: the layer's; what its slots held before has been released.
        slots: int64 [T]: page * page_size + place in the page, all different. Nothing is stored of
            a token whose slot is negative: it takes no row, is not marked and not counted.
        limits: float32 [T], the largest error allowed.
        failed: bool [T]; set where two digits were too few, or the pool had no row.
        rule: how keys are made of values, if they are.
    """
    stored = slots >= 0
    key = None if key is None else key[stored]
    value, slots, limits = value[stored], slots[stored], limits[stored] * STRICT
    sides = value[:, None] if key is None else torch.stack((key, value), 1)
    exact = turned(sides, cache.format)
    codes, scales = _digit(exact, cache.format)
    left = exact - codes * scales[..., None]
    error = _error(left, exact, cache.format, rule)
    wide = ~(error <= limits[:, None])
    codes2, scales2 = _digit(left, cache.format)
    error2 = _error(left - codes2 * scales2[..., None], exact, cache.format, rule)

    pool = cache.overflow
    wanting = wide.flatten().nonzero().flatten()
    got = min(len(wanting), int(pool.count))
    begin = int(pool.count) - got
    rows = pool.free[begin : begin + got]
    pool.count.fill_(begin)
    second = torch.full(wide.shape, NONE, dtype=torch.int32, device=value.device)
    second.view(-1)[wanting[:got]] = rows
    has = second != NONE
    pool.codes[rows.long()] = _packed(codes2, cache.format).transpose(1, 2)[has]
    pool.scales[rows.long()] = scales2.bfloat16().transpose(1, 2)[has]

    page, place = slots // cache.page_size, slots % cache.page_size
    cache.codes[page, :, :, place] = _packed(codes, cache.format)
    cache.scales[page, :, :, place] = scales.bfloat16()
    cache.second[page, :, place] = second
    final = torch.where(has, error2, error)
    failed[stored] |= ~(final <= limits[:, None]).all(1)
    cache.tally[0] += second.numel()
    cache.tally[1] += has.sum()
    if len(final):
        finite = final.nan_to_num(0.0, posinf=0.0)
        torch.maximum(cache.largest, finite.max(), out=cache.largest)


def release(second: Tensor, overflow: Overflow, pages: Tensor) -> None:
    """Gives the second digits of some pages back to the pool, for all layers of a group.

    Args:
        second: int32 [layers, pages, kv_heads, page_size].
        overflow: the layers' pool.
        pages: int64 [n], all different.
    """
    held = second[:, pages]
    rows = held[held != NONE]
    begin = int(overflow.count)
    overflow.free[begin : begin + len(rows)] = rows
    overflow.count.fill_(begin + len(rows))
    second[:, pages] = NONE


def read(cache: NarrowCache, tables: Tensor, rule: KeyRule | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values of pages, float32 [B, n * page_size, kv_heads, head_dim] each.

    `tables` is int64 [B, n]; where keys are made of values, key j of a row is that of position j.
    """
    codes = _unpacked(cache.codes[tables], cache.format)
    numbers = codes * cache.scales[tables].float()[..., None]
    second = cache.second[tables]
    at = second.clamp(min=0).long()
    pool = cache.overflow
    more = _unpacked(pool.codes[at], cache.format) * pool.scales[at].float()[..., None]
    more = torch.where((second == NONE)[..., None, None], 0.0, more)
    # From [B, n, sides, kv_heads, page_size, ...] and [B, n, kv_heads, page_size, sides, ...].
    numbers = numbers.permute(0, 1, 4, 2, 3, 5) + more.permute(0, 1, 3, 4, 2, 5)
    exact = turned_back(numbers, cache.format).flatten(1, 2)
    value = exact[:, :, -1]
    if rule is None:
        return exact[:, :, 0], value
    return made_keys(value, rule, torch.arange(value.shape[1], device=value.device)), value


def gather(
    cache: NarrowCache | tuple[Tensor, Tensor],
    tables: Tensor,
    length: int,
    rule: KeyRule | None,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    """Writes out the keys and values of one sequence's first `length` tokens, rounded once.

    Args:
        cache: narrow, or the keys and values [pages, page_size, kv_heads, head_dim] of a plain one.
        tables: int64 [pages of the sequence].
        length: no more than the pages hold.
        rule: how keys are made of values, if they are; key j is that of position j.
        out_key: [kv_heads, length or more, head_dim], any floating dtype; nothing from `length` on
            is touched.
        out_value: likewise.
    """
    if isinstance(cache, NarrowCache):
        keys, values = (own[0, :length] for own in read(cache, tables[None]))
    else:
        keys, values = (own[tables].flatten(0, 1)[:length] for own in cache)
    if rule is not None:
        keys = made_keys(values, rule, torch.arange(length, device=values.device))
    out_key[:, :length] = keys.transpose(0, 1)
    out_value[:, :length] = values.transpose(0, 1)


def made_keys(value: Tensor, rule: KeyRule, positions: Tensor) -> Tensor:
    """The keys of values [..., T, kv_heads, head_dim] at `positions`, int64 [T]; float32."""
    weighted = value.float() * rule.weight
    pairs, half = rule.cosines.shape[1], value.shape[-1] // 2
    cosine, sine = (table[positions][:, None] for table in (rule.cosines, rule.sines))
    first, second = weighted[..., :pairs], weighted[..., half : half + pairs]
    turned_pairs = first * cosine - second * sine, second * cosine + first * sine
    rest = weighted[..., pairs:half], weighted[..., half + pairs :]
    return torch.cat((turned_pairs[0], rest[0], turned_pairs[1], rest[1]), -1)


def attention(
    query: Tensor, cache: NarrowCache, pages: Pages, rule: KeyRule | None = None
) -> Tensor:
    """softmax(query keys) values with scale 1; [B, L, heads, head_dim] to the same.

    Query head h reads kv head h // (heads / kv_heads).
    """
    assert pages.bias is not None, "planned for kernels"
    keys, values = read(cache, pages.tables, rule)
    mixed = F.scaled_dot_product_attention(
        query.float().transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=pages.bias.float(),
        scale=1.0,
        enable_gqa=True,
    )
    return mixed.transpose(1, 2).to(query.dtype)


def _digit(exact: Tensor, format: KVFormat) -> tuple[Tensor, Tensor]:
    """Integers (as float32) and the scale, a bfloat16 in float32, of [..., head_dim]."""
    needed = exact.abs().amax(-1) / format.limit
    scale = needed.bfloat16().float()
    scale = torch.where(scale < needed, needed * _SCALE_SLACK, needed).bfloat16().float()
    scale = scale.clamp(min=_LEAST_SCALE)
    return (exact * (1 / scale)[..., None]).round().clamp(-format.limit, format.limit), scale


def _error(left: Tensor, exact: Tensor, format: KVFormat, rule: KeyRule | None) -> Tensor:
    """The larger relative error of a head's key and value, [T, heads]; `left` is what is missing.

    Both are [T, sides, heads, head_dim].
    """
    errors = _relative(left, exact)
    if rule is not None:
        missing, whole = (turned_back(own, format) * rule.weight for own in (left, exact))
        errors = errors.maximum(_relative(missing, whole))
    largest: Tensor = errors.amax(1)
    return largest


def _relative(left: Tensor, whole: Tensor) -> Tensor:
    """||left|| / ||whole|| over the last dimension, 0 of zeros.

    Both by the largest of `whole` first: squares of 1e-22 and of 1e20 are 0 and infinity.
    """
    largest = whole.abs().amax(-1, keepdim=True).clamp(min=_LEAST_SCALE)
    lost, size = ((own / largest).norm(dim=-1) for own in (left, whole))
    relative: Tensor = lost / size.clamp(min=1e-30)
    return relative


def _packed(codes: Tensor, format: KVFormat) -> Tensor:
    """uint8 [..., width] of whole numbers [..., head_dim]."""
    whole = codes.to(torch.int8).view(torch.uint8)
    if format.bits == 8:
        return whole
    low, high = whole.chunk(2, -1)
    return (low & 15) | (high << 4)


def _unpacked(codes: Tensor, format: KVFormat) -> Tensor:
    """float32 [..., head_dim]"""
    if format.bits == 8:
        return codes.view(torch.int8).float()
    both = torch.cat((codes << 4, codes & 0xF0), -1).view(torch.int8)
    numbers: Tensor = (both >> 4).float()
    return numbers
