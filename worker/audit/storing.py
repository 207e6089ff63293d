"""Keys and values that go through a narrow cache and come back, with all that is to be known of it.

`NarrowAttention` is an `Attention` for whole sequences: what a layer makes is stored in a cache of
its own and read back, and attention goes on with what was read. Pages are handed out backwards, so
that a table that is not followed shows. What it gave up: the pool of an engine, which many
sequences share; here each layer has a row for every head, and how many were needed is told.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import gather, reference, store
from ...kernels.attention.cache import NONE, KeyRule, KVFormat, NarrowCache, Overflow
from ..model.config import ModelConfig, cache_groups
from ..model.decoder import Decoder, DenseAttention
from ..narrow import key_rule, key_weights, kv_formats

PAGE = 16
"""Tokens of a page."""


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What the tensors of one layer take for a token; of the pool, for a row."""

    codes: float
    scales: float
    indices: float
    row: float
    """With its place in the list of free rows."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one layer stored of a sequence, and what came back."""

    exact: tuple[Tensor, Tensor]
    """Keys and values [T, kv_heads, head_dim] as the model made them."""
    read: tuple[Tensor, Tensor]
    """The same, float32, from the cache; keys may be made of values there."""
    wide: Tensor
    """bool [T, kv_heads]: has a second digit."""
    failed: Tensor
    """bool [T]: the store itself says that it is not near enough."""
    claimed: float
    """The largest error of a vector by the store's own account."""
    bytes: TokenBytes


@dataclass(frozen=True, slots=True)
class Storage:
    """How the layers of a model that own keys store them, within one error."""

    max_error: float
    formats: Mapping[int, KVFormat]
    rules: Mapping[int, KeyRule]
    """Of the layers whose keys are made of values."""

    @classmethod
    def of(cls, decoder: Decoder, max_error: float, positions: int) -> "Storage":
        """As an engine chooses it, for sequences of up to so many tokens."""
        config, weights = decoder.config, key_weights(decoder)
        groups = cache_groups(config)
        chosen = kv_formats(config, groups, max_error, weights)
        formats = {
            index: format
            for group, format in zip(groups, chosen, strict=True)
            for index in group.layers
        }
        device = decoder.embedding.weight.device
        rules = {
            index: key_rule(config.layers[index], weights[index], positions, device)
            for index, format in formats.items()
            if format.pairs is not None
        }
        return cls(max_error, formats, rules)


def through_cache(
    key: Tensor, value: Tensor, format: KVFormat, rule: KeyRule | None, max_error: float
) -> Reading:
    """Stores a sequence in an empty cache and reads it back.

    Args:
        key: [T, kv_heads, head_dim], at positions 0 to T - 1; where there is a `rule` it is not
            stored, only compared.
        value: likewise, of the same floating dtype.
        format: of the cache.
        rule: how keys are made of values, where `format` stores values alone.
        max_error: what every vector is asked to be within.
    """
    tokens, device = len(value), value.device
    table = torch.arange(-(-tokens // PAGE), device=device).flip(0)
    place = torch.arange(tokens, device=device)
    slots = table[place // PAGE] * PAGE + place % PAGE
    pool = Overflow.empty(format, tokens * format.kv_heads, device)
    cache = NarrowCache.empty(format, len(table), PAGE, pool)
    failed = torch.zeros(tokens, dtype=torch.bool, device=device)
    limits = torch.full((tokens,), max_error, device=device)
    read = torch.empty(2, format.kv_heads, tokens, format.head_dim, device=device)
    on_card = value.is_cuda
    put, get = (store.store, gather.gather) if on_card else (reference.store, reference.gather)
    own = key.contiguous() if rule is None else None
    put(own, value.contiguous(), cache, slots, limits, failed, rule)
    get(cache, table, tokens, rule, read[0], read[1])
    return Reading(
        exact=(key, value),
        read=(read[0].transpose(0, 1), read[1].transpose(0, 1)),
        wide=cache.second[slots // PAGE, :, slots % PAGE] != NONE,
        failed=failed,
        claimed=float(cache.largest),
        bytes=_bytes(cache),
    )


def _bytes(cache: NarrowCache) -> TokenBytes:
    places = cache.second.shape[0] * cache.page_size
    pool, rows = cache.overflow, len(cache.overflow.free)
    held = pool.codes.nbytes + pool.scales.nbytes + pool.free.nbytes
    return TokenBytes(
        codes=cache.codes.nbytes / places,
        scales=cache.scales.nbytes / places,
        indices=cache.second.nbytes / places,
        row=held / max(1, rows),
    )


class NarrowAttention:
    """`DenseAttention` over one sequence whose keys and values have been in narrow caches.

    `seen` is told the layer and its `Reading`. Layers that read another's keys read the same ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        length: int,
        storage: Storage,
        seen: Callable[[int, Reading], None],
    ) -> None:
        self.dense = DenseAttention(config, [length])
        self.storage = storage
        self.seen = seen

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """See `Attention`."""
        if key is not None and value is not None:
            own = self.storage
            rule = own.rules.get(layer)
            reading = through_cache(key, value, own.formats[layer], rule, own.max_error)
            self.seen(layer, reading)
            key, value = (each.to(query.dtype) for each in reading.read)
        return self.dense.attend(layer, query, key, value)
