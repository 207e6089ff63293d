"""Who attends in `benchmarks.attention`: our kernels over pages, and torch over plain tensors.

Layers are those of Gemma 4. Each way has enough copies of its keys and values to pass the L2 cache,
and knows the answer to some of its queries by the reference in float32. Pages lie in random order.
Torch has its own keys and values, [B, kv_heads, keys, head_dim] without gaps, of a sliding layer
just those of the window, as no table has to be followed; the heads of a group are either queries of
one head or left to `enable_gqa`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from conclave.kernels.attention import reference as narrow_reference
from conclave.kernels.attention.cache import KeyRule, KVFormat, NarrowCache, Overflow
from conclave.kernels.attention.ops import attention, store
from conclave.kernels.attention.prefill import prefill
from conclave.kernels.reference import Pages, paged_attention, plan_pages

from .clock import copies_past_cache
from .contestants import relative_error

PAGE = 16
"""Tokens of a page."""
MAX_ERROR = 0.01
"""Of what is stored."""
_WIDE = 4
"""One in so many heads of tokens has room for a second digit; keys made of values ask for some."""
THETA = 1e6
"""Of RoPE in full layers."""
_CHUNK = 1 << 16
"""Tokens that are stored at once."""
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class Layer(NamedTuple):
    """Attention of one kind of layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    pairs: int | None = None
    """Of columns that RoPE turns, where keys are made of values."""

    def keys(self, context: int) -> int:
        """How many a decoding query sees."""
        return min(context, self.window or context)

    @property
    def format(self) -> KVFormat:
        """In 8 bits."""
        return KVFormat(self.kv_heads, self.head_dim, 8, self.pairs)

    def query(self, rows: int, device: str) -> Tensor:
        """bfloat16 [rows, heads, head_dim]; scores of random keys have a deviation of 2."""
        drawn = torch.randn(rows, self.heads, self.head_dim, device=device)
        query: Tensor = drawn * 2 / self.head_dim**0.5
        return query.to(torch.bfloat16)


@dataclass(frozen=True)
class Way:
    """One way to attend."""

    name: str
    copies: int
    nbytes: int
    """Of keys and values, as one launch reads them."""
    attend: Callable[[int], Tensor]
    """Number of a copy to all outputs, [rows, heads, head_dim]."""
    rows: list[int]
    """Which outputs are checked."""
    wanted: Callable[[int], Tensor]
    """Row to its right output for copy 0, float32 [heads, head_dim]."""
    most_error: float = 4e-3

    def check(self) -> float:
        """The largest relative error of the checked rows; WrongAnswer if that is too large.

        An element that nobody writes shows: freed memory, where the answer will lie, is NaN before.
        """
        torch.full_like(self.attend(0), torch.nan)
        answer = self.attend(0)
        return max(
            relative_error(answer[row], self.wanted(row).double(), self.most_error)
            for row in self.rows
        )


def own_plain(layer: Layer, batch: int, context: int, device: str) -> Iterator[Way]:
    """Our kernel over bfloat16 pages of keys and values."""
    keys = layer.keys(context)
    tables, pages = _paged(layer, batch, context, device)
    shape = (tables.shape[0] * keys // PAGE, PAGE, layer.kv_heads, layer.head_dim)
    nbytes = 4 * batch * keys * layer.kv_heads * layer.head_dim
    copies = [_random_pair(shape, device) for _ in range(copies_past_cache(nbytes))]
    query = layer.query(batch, device)

    def wanted(row: int) -> Tensor:
        own, local = _alone(tables[row], keys)
        key, value = (each[own].float() for each in copies[0])
        return paged_attention(query[row, None, None].float(), key, value, local)[0, 0]

    def attend(copy: int) -> Tensor:
        return attention(query[:, None], copies[copy], pages)[:, 0]

    yield Way("decode", len(copies), nbytes, attend, _ends(batch), wanted)


def own_int8(layer: Layer, batch: int, context: int, device: str) -> Iterator[Way]:
    """Our kernel over pages in 8 bits: of keys and values, or of values alone."""
    keys = layer.keys(context)
    tables, pages = _paged(layer, batch, context, device)
    nbytes = batch * keys * layer.format.token_bytes
    count = copies_past_cache(nbytes)
    copies = [_stored(layer, batch * keys // PAGE, device) for _ in range(count)]
    rule = None if layer.pairs is None else _rule(layer.head_dim, layer.pairs, context, device)
    query = layer.query(batch, device)

    def wanted(row: int) -> Tensor:
        own, local = _alone(tables[row], keys)
        whole = copies[0]
        parts = {name: getattr(whole, name)[own] for name in ("codes", "scales", "second")}
        asked = query[row, None, None].float()
        return narrow_reference.attention(asked, replace(whole, **parts), local, rule)[0, 0]

    def attend(copy: int) -> Tensor:
        return attention(query[:, None], copies[copy], pages, rule)[:, 0]

    heads, wide = copies[0].tally.tolist()
    name = "values alone" if layer.pairs is not None else "keys and values"
    note = f"{name}, {wide / heads:.1%} of heads in two digits"
    nbytes += wide * layer.format.row_bytes
    yield Way(note, count, nbytes, attend, _ends(batch), wanted)


def torch_decode(layer: Layer, batch: int, context: int, device: str) -> Iterator[Way]:
    """Every backend of SDPA."""
    plain = _Plain(layer, batch, context, device)
    for name, backend in _BACKENDS.items():
        yield plain.way(f"{name}, grouped", partial(_sdpa, backend, plain.grouped))
        # The others would write keys and values out for every head.
        if name in ("flash", "cuDNN"):
            attend = partial(_sdpa, backend, plain.query[:, :, None], enable_gqa=True)
            yield plain.way(f"{name}, enable_gqa", attend)


def flex_decode(layer: Layer, batch: int, context: int, device: str) -> Iterator[Way]:
    """FlexAttention, compiled for this shape."""
    plain = _Plain(layer, batch, context, device)
    attend = torch.compile(flex_attention, dynamic=False)
    asked = plain.query[:, :, None]
    yield plain.way("compiled", partial(attend, asked, enable_gqa=True, scale=1.0))


class _Plain:
    """Keys and values as torch takes them, and queries."""

    def __init__(self, layer: Layer, batch: int, context: int, device: str) -> None:
        shape = (batch, layer.kv_heads, layer.keys(context), layer.head_dim)
        self.nbytes = 4 * prod(shape)
        self.copies = [_random_pair(shape, device) for _ in range(copies_past_cache(self.nbytes))]
        self.query = layer.query(batch, device)
        self.grouped = self.query.view(batch, layer.kv_heads, -1, layer.head_dim)

    def way(self, name: str, attend: Callable[[Tensor, Tensor], Tensor]) -> Way:
        """One that is given keys and values."""

        def launch(copy: int) -> Tensor:
            return attend(*self.copies[copy]).reshape(self.query.shape)

        # Torch may round scores to bfloat16.
        rows = _ends(len(self.query))
        return Way(name, len(self.copies), self.nbytes, launch, rows, self._wanted, 2e-2)

    def _wanted(self, row: int) -> Tensor:
        key, value = (each[row].float() for each in self.copies[0])
        scores = self.grouped[row].float() @ key.transpose(1, 2)
        return (scores.softmax(-1) @ value).flatten(0, 1)


def own_prefill(layer: Layer, tokens: int, device: str) -> Iterator[Way]:
    """Our kernel over keys and values that are written out."""
    query, pair = layer.query(tokens, device), _random_pair(_chunk(layer, tokens), device)

    def attend(_: int) -> Tensor:
        out = torch.empty_like(query)
        prefill(query, *pair, 0, layer.window, out)
        return out

    yield _prefill_way(layer, "prefill", query, pair, attend)


def torch_prefill(layer: Layer, tokens: int, device: str) -> Iterator[Way]:
    """Every backend of SDPA; causal, or with a mask where there is a window."""
    query, pair = layer.query(tokens, device), _random_pair(_chunk(layer, tokens), device)
    own = query.transpose(0, 1)[None]
    rule: dict[str, Any] = {"is_causal": True}
    if layer.window is not None:
        at = torch.arange(tokens, device=device)
        rule = {"attn_mask": (at <= at[:, None]) & (at > at[:, None] - layer.window)}
    group = layer.heads // layer.kv_heads
    repeated = tuple(each.repeat_interleave(group, 0)[None] for each in pair)

    def launch(backend: SDPBackend, _: int) -> Tensor:
        return _sdpa(backend, own, *repeated, **rule)[0].transpose(0, 1)

    for name, backend in _BACKENDS.items():
        way = _prefill_way(layer, name, query, pair, partial(launch, backend))
        yield replace(way, most_error=2e-2)


def pairs_seen(tokens: int, window: int | None) -> int:
    """(query, key) that see each other in a prompt."""
    most = min(tokens, window or tokens)
    return most * (most + 1) // 2 + (tokens - most) * most


def _prefill_way(
    layer: Layer, name: str, query: Tensor, pair: Pair, attend: Callable[[int], Tensor]
) -> Way:
    tokens = len(query)

    def wanted(row: int) -> Tensor:
        seen = slice(max(0, row + 1 - (layer.window or tokens)), row + 1)
        key, value = (each[:, seen].float() for each in pair)
        grouped = query[row].float().view(layer.kv_heads, -1, layer.head_dim)
        return ((grouped @ key.transpose(1, 2)).softmax(-1) @ value).flatten(0, 1)

    rows = sorted({0, tokens - 1, *range(0, tokens, max(1, tokens // 31))})
    return Way(name, 1, 2 * pair[0].nbytes, attend, rows, wanted)


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, **rule: Any) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, scale=1.0, **rule)


def _chunk(layer: Layer, tokens: int) -> tuple[int, ...]:
    return layer.kv_heads, tokens, layer.head_dim


def _ends(batch: int) -> list[int]:
    return sorted({0, batch - 1})


def _random_pair(shape: tuple[int, ...], device: str) -> Pair:
    key, value = (
        torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)
    )
    return key, value


def _paged(layer: Layer, batch: int, context: int, device: str) -> tuple[Tensor, Pages]:
    """Tables [B, context / PAGE] of rows whose last query is key context - 1, and their plan.

    Row b has the pages from b n on, n for what it sees, in random order; all before are page 0.
    """
    count = layer.keys(context) // PAGE
    tables = torch.zeros(batch, context // PAGE, dtype=torch.int64, device=device)
    order = torch.rand(batch, count, device=device).argsort(1)
    tables[:, -count:] = torch.arange(batch, device=device)[:, None] * count + order
    offsets = torch.full((batch,), context - 1, device=device)
    dtype = None if device == "cuda" else torch.bfloat16
    sizes: dict[str, Any] = {"queries": 1, "block_size": PAGE, "dtype": dtype}
    return tables, plan_pages(tables, offsets, layer.window, **sizes)


def _alone(table: Tensor, keys: int) -> tuple[Tensor, Pages]:
    """The pages that a row sees, and a plan for them as a sequence of their own."""
    own = table[-(keys // PAGE) :]
    local = torch.arange(len(own), device=table.device)[None]
    last = torch.full((1,), keys - 1, device=table.device)
    sizes: dict[str, Any] = {"queries": 1, "block_size": PAGE, "dtype": torch.float32}
    return own, plan_pages(local, last, None, **sizes)


def _stored(layer: Layer, pages: int, device: str) -> NarrowCache:
    """Random keys and values through our own store, with room for second digits of any."""
    rows = pages * PAGE * layer.kv_heads // _WIDE
    pool = Overflow.empty(layer.format, rows, torch.device(device))
    made = NarrowCache.empty(layer.format, pages, PAGE, pool)
    for begin in range(0, pages * PAGE, _CHUNK):
        slots = torch.arange(begin, min(begin + _CHUNK, pages * PAGE), device=device)
        key, value = _random_pair((len(slots), layer.kv_heads, layer.head_dim), device)
        limits = torch.full((len(slots),), MAX_ERROR, device=device)
        failed = torch.zeros(len(slots), dtype=torch.bool, device=device)
        rule = None
        if layer.pairs is not None:
            rule = _rule(layer.head_dim, layer.pairs, PAGE, device)
        store(None if rule else key, value, made, slots, limits, failed, rule)
        assert not failed.any()
    return made


@cache
def _rule(head_dim: int, pairs: int, positions: int, device: str) -> KeyRule:
    """Keys of values: a random weight near 1 and the RoPE of full layers."""
    rates = THETA ** (-2 * torch.arange(pairs, device=device) / head_dim)
    angles = torch.arange(positions, device=device)[:, None] * rates
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.rand(head_dim, device=device, generator=generator) + 0.5
    return KeyRule(weight, angles.cos(), angles.sin())
