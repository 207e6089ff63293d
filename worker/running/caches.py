"""Where keys and values lie on the device: plain tensors, or narrow numbers within an error.

Both know layers that own keys by their index, and groups of them by their number. Plain ones can be
recorded with the step that uses them (`recording.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.attention import ops
from ...kernels.attention.cache import KeyRule, KVFormat, NarrowCache, Overflow
from ...kernels.reference import Pages
from ..model.config import CacheGroup, ModelConfig, cache_groups
from ..narrow import key_rule

Tensors = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of each layer that owns some, [blocks, block_size, kv_heads, head_dim]."""


LEAST_ROWS = 64
"""Of a pool of second digits."""


@dataclass(frozen=True, slots=True)
class LayerUse:
    """What a layer has stored in narrow numbers since the start."""

    layer: int
    heads: int
    """Heads of tokens, each with its key and value."""
    seconds: int
    """Of them those that got a second digit."""
    largest: float
    """Relative error of a key or value, the largest so far."""


@dataclass(frozen=True, slots=True)
class NarrowUse:
    """The pool of second digits of a cache group, and its layers."""

    bits: int
    """Of a digit."""
    rows: int
    """Second digits that there is room for."""
    used: int
    layers: tuple[LayerUse, ...]


class Caches(Protocol):
    """Keys and values of all layers."""

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Stores [T, kv_heads, head_dim] each of T tokens at int64 `slots` [T], if not negative."""
        ...

    def attend(self, layer: int, query: Tensor, pages: Pages) -> Tensor:
        """[B, L, heads, head_dim] to the same, over what `write` has stored."""
        ...


@dataclass(frozen=True, slots=True)
class PlainCaches:
    """In the dtype of the model."""

    tensors: Tensors

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        blocks: Sequence[int],
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "PlainCaches":
        """So many blocks for each of `cache_groups(config)`.

        Zeros: an unwritten place of a block is read with weight 0, and 0 * NaN is NaN.
        """
        tensors: Tensors = {}
        for group, count in zip(cache_groups(config), blocks, strict=True):
            for index in group.layers:
                layer = config.layers[index]
                shape = (count, block_size, layer.kv_heads, layer.head_dim)
                keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
                tensors[index] = (keys, values)
        return cls(tensors)

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `Caches`."""
        ops.write(key, value, *self.tensors[layer], slots)

    def attend(self, layer: int, query: Tensor, pages: Pages) -> Tensor:
        """See `Caches`."""
        return ops.attention(query, self.tensors[layer], pages)

    def wipe(self, group: CacheGroup, blocks: Tensor) -> None:
        """Zero blocks, int64 [n]."""
        for layer in group.layers:
            for tensor in self.tensors[layer]:
                tensor.index_fill_(0, blocks, 0)


@dataclass(frozen=True, slots=True)
class _Group:
    """The narrow layers of one group."""

    second: Tensor
    """int32 [layers, blocks, kv_heads, block_size]: that of all its layers."""
    overflow: Overflow
    rows: int


class NarrowCaches:
    """In narrow numbers, each vector within an error that its sequence may set.

    Args:
        config: of the model.
        formats: of each of its `cache_groups`.
        shares: of each group, the room for second digits, as a share of all heads of tokens.
        blocks: of each group.
        block_size: tokens in a block.
        weights: k_norm's weight of layers whose keys are made of values.
        positions: the longest context.
        max_error: of sequences that set none.
        device: where all lies.
    """

    def __init__(
        self,
        config: ModelConfig,
        formats: Sequence[KVFormat],
        shares: Sequence[float],
        blocks: Sequence[int],
        block_size: int,
        weights: Mapping[int, Tensor],
        positions: int,
        max_error: float,
        device: torch.device,
    ) -> None:
        self.max_error = max_error
        self.device = device
        self.layers: dict[int, NarrowCache] = {}
        groups = cache_groups(config)
        self._of_groups = [group.layers for group in groups]
        self._groups: list[_Group] = []
        self._rules: dict[int, KeyRule | None] = {}
        self._limits = torch.empty(0, device=device)
        self.failed = torch.empty(0, dtype=torch.bool, device=device)
        """bool [T]: tokens of the step that found no room for what they needed."""
        room = -(-positions // block_size) * block_size
        for group, format, share, count in zip(groups, formats, shares, blocks, strict=True):
            heads = len(group.layers) * count * block_size * format.kv_heads
            rows = max(LEAST_ROWS, math.ceil(share * heads))
            pool = Overflow.empty(format, rows, device)
            caches = [NarrowCache.empty(format, count, block_size, pool) for _ in group.layers]
            second = torch.stack([own.second for own in caches])
            self._groups.append(_Group(second, pool, rows))
            rule: KeyRule | None = None
            for index, cache, own in zip(group.layers, caches, second, strict=True):
                self.layers[index] = replace(cache, second=own)
                if format.pairs is not None:
                    # The tables are those of all layers of the group.
                    rule = rule or key_rule(config.layers[index], weights[index], room, device)
                    rule = replace(rule, weight=weights[index].to(device))
                self._rules[index] = rule

    def begin(self, limits: Tensor) -> None:
        """Told before a step's writes: how far off each of its tokens may be, float32 [T]."""
        self._limits = limits
        self.failed = torch.zeros(len(limits), dtype=torch.bool, device=self.device)

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `Caches`."""
        rule = self._rules[layer]
        own = key if rule is None else None
        ops.store(own, value, self.layers[layer], slots, self._limits, self.failed, rule)

    def attend(self, layer: int, query: Tensor, pages: Pages) -> Tensor:
        """See `Caches`."""
        return ops.attention(query, self.layers[layer], pages, self._rules[layer])

    def release(self, group: int, blocks: Tensor) -> None:
        """Give back the second digits in blocks, int64 [n], that are about to be written anew."""
        own = self._groups[group]
        ops.release(own.second, own.overflow, blocks)

    def wipe(self, group: CacheGroup, blocks: Tensor) -> None:
        """Zero blocks, int64 [n], whose second digits have been given back."""
        for layer in group.layers:
            self.layers[layer].codes.index_fill_(0, blocks, 0)
            self.layers[layer].scales.index_fill_(0, blocks, 0)

    def use(self) -> tuple[NarrowUse, ...]:
        """How full the pools are, and what has been stored; waits for the device."""
        found = []
        for own, indices in zip(self._groups, self._of_groups, strict=True):
            caches = [self.layers[index] for index in indices]
            tallies = torch.stack([cache.tally for cache in caches]).tolist()
            largest = torch.cat([cache.largest for cache in caches]).tolist()
            layers = tuple(
                LayerUse(index, heads, seconds, most)
                for index, (heads, seconds), most in zip(indices, tallies, largest, strict=True)
            )
            used = own.rows - int(own.overflow.count)
            found.append(NarrowUse(caches[0].format.bits, own.rows, used, layers))
        return tuple(found)
