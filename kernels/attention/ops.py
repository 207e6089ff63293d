"""Attention over paged caches, and which kernel does it.

| queries of a sequence | plain cache                       | narrow cache                    |
| --------------------- | --------------------------------- | ------------------------------- |
| one                   | `decode`                          | `decode`                        |
| more                  | `gather`, then `prefill`          | the same                        |
| new keys and values   | `write`                           | `store`                         |

On a CPU the reference runs; for float32 on a card it attends.
"""

import torch
from torch import Tensor

from .. import reference as plain
from ..reference import Pages
from . import reference
from .cache import KeyRule, NarrowCache, Overflow
from .decode import PlainCache, decode
from .gather import gather
from .prefill import prefill
from .store import release as release_on_card
from .store import store as store_on_card
from .write import write as write_on_card


def write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See `write_kv` of the plain reference."""
    (write_on_card if key.is_cuda else plain.write_kv)(key, value, keys, values, slots)


def store(
    key: Tensor | None,
    value: Tensor,
    cache: NarrowCache,
    slots: Tensor,
    limits: Tensor,
    failed: Tensor,
    rule: KeyRule | None = None,
) -> None:
    """See `reference.store`."""
    if value.is_cuda:
        key = None if key is None else key.contiguous()
        store_on_card(key, value.contiguous(), cache, slots, limits, failed, rule)
    else:
        reference.store(key, value, cache, slots, limits, failed, rule)


def release(second: Tensor, overflow: Overflow, pages: Tensor) -> None:
    """See `reference.release`."""
    (release_on_card if second.is_cuda else reference.release)(second, overflow, pages)


def attention(
    query: Tensor, cache: NarrowCache | PlainCache, pages: Pages, rule: KeyRule | None = None
) -> Tensor:
    """softmax(query keys) values with scale 1; [B, L, heads, head_dim] to the same.

    Query head h reads kv head h // (heads / kv_heads); see `Pages` for who sees what.
    """
    if not query.is_cuda or query.dtype == torch.float32:
        if isinstance(cache, NarrowCache):
            return reference.attention(query, cache, pages, rule)
        return plain.paged_attention(query, *cache, pages)
    query = query.contiguous()
    out = torch.empty_like(query)
    if query.shape[1] == 1:
        decode(query[:, 0], cache, pages.tables, pages.offsets, pages.window, rule, out[:, 0])
        return out
    for row, begin in enumerate(pages.begins):
        _prefill(query[row], cache, pages, row, begin, rule, out[row])
    return out


def _prefill(
    query: Tensor,
    cache: NarrowCache | PlainCache,
    pages: Pages,
    row: int,
    begin: int,
    rule: KeyRule | None,
    out: Tensor,
) -> None:
    """A chunk of one sequence, whose first query is key `begin` of its own."""
    if isinstance(cache, NarrowCache):
        kv_heads, size = cache.format.kv_heads, cache.page_size
    else:
        kv_heads, size = cache[0].shape[2], cache[0].shape[1]
    length = begin + len(query)
    shape = (2, kv_heads, length, query.shape[-1])
    keys, values = torch.empty(shape, dtype=query.dtype, device=query.device)
    gather(cache, pages.tables[row, : -(-length // size)], length, rule, keys, values)
    prefill(query, keys, values, begin, pages.window, out)
