"""Which narrow numbers each group of layers stores its keys and values in, by the error allowed.

The rule is `max_error`: ||x - stored|| / ||x|| of every key and value, of every token, layer and
head. Hadamard matrices make of any vector one whose numbers are nearly normally distributed, so how
many will need a second digit follows from the head's size. What it gave up: a format for each
layer; those of a group share a block table and a pool, so they share a format.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.attention.cache import BITS, KeyRule, KVFormat
from .errors import ConfigError
from .model.config import CacheGroup, LayerConfig, ModelConfig, cache_groups
from .model.decoder import Decoder
from .model.layers import rope_frequencies

LEAST_SHARE = 1 / 32
"""Of the heads of tokens: room for second digits, where hardly any is expected."""
_MARGIN = 2
"""How much more room than is expected to be taken."""
_WORTH = 0.9
"""Narrower digits must take at most this much of the bytes: two of them cost time."""


def key_weights(decoder: Decoder) -> dict[int, Tensor]:
    """k_norm's weight, float32 [head_dim], by layer: of those whose keys are made of values."""
    found = {}
    for index, layer in enumerate(decoder.config.layers):
        if layer.kv_source == index and not layer.has_value_projection:
            norms = decoder.get_parameter(f"layers.{index}.attention.head_norms")
            found[index] = norms.detach()[layer.head_dim :].float()
    return found


def key_rule(layer: LayerConfig, weight: Tensor, positions: int, device: torch.device) -> KeyRule:
    """How a layer's keys are made of its values, at the first `positions`."""
    frequencies = rope_frequencies(layer.head_dim, layer.rope)[: layer.rope.pairs].to(device)
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    return KeyRule(weight.to(device), angles.cos(), angles.sin())


def check_alike(config: ModelConfig) -> None:
    """ConfigError if layers of a group differ in their heads: they could not share a format."""
    for group in cache_groups(config):
        first, *others = group.layers
        for index in others:
            if _heads(config.layers[index]) != _heads(config.layers[first]):
                kind = "full-attention" if group.window is None else "sliding"
                raise ConfigError(
                    f"max_error needs {kind} layers that are alike; layer {first} has "
                    f"{_heads(config.layers[first])}, layer {index} "
                    f"{_heads(config.layers[index])}: leave it out for this model"
                )


def kv_formats(
    config: ModelConfig,
    groups: Sequence[CacheGroup],
    max_error: float,
    weights: Mapping[int, Tensor],
) -> tuple[KVFormat, ...]:
    """The format of each group, whose vectors two digits can hold within `max_error`.

    That is so for every value, and for a key that is stored. One that is made of a value which lies
    where k_norm's weight is next to nothing may be further off; storing it says so. `weights` are
    the `key_weights` of the model. Raises ConfigError as `check_alike` does.
    """
    check_alike(config)
    return tuple(_format(config, group, max_error, weights) for group in groups)


def second_share(format: KVFormat, max_error: float) -> float:
    """Room for second digits, as a share of all heads of tokens: `_MARGIN` times those expected.

    A digit of normal numbers is off by crest / (sqrt(12) limit), crest being the largest magnitude
    over the root mean square; how likely a crest is, follows from the normal distribution.
    """
    crest = max_error * math.sqrt(12) * format.limit
    one = min(1.0, format.head_dim * math.erfc(crest / math.sqrt(2)))
    either = 1 - (1 - one) ** 2  # the key and the value
    return min(1.0, max(LEAST_SHARE, _MARGIN * either))


def token_bytes(group: CacheGroup, format: KVFormat, share: float) -> int:
    """Of one token in all layers of a group, with its share of the pool."""
    pool = share * format.kv_heads * format.row_bytes
    return math.ceil(len(group.layers) * (format.token_bytes + pool))


def expected_token_bytes(
    config: ModelConfig, max_error: float | None, dtype_size: int
) -> list[int]:
    """Of one token in each cache group, before weights are known: k_norm's are taken to be even."""
    groups = cache_groups(config)
    if max_error is None:
        return [group.bytes_per_token(dtype_size) for group in groups]
    even = {
        index: torch.ones(layer.head_dim)
        for index, layer in enumerate(config.layers)
        if layer.kv_source == index and not layer.has_value_projection
    }
    formats = kv_formats(config, groups, max_error, even)
    return [
        token_bytes(group, format, second_share(format, max_error))
        for group, format in zip(groups, formats, strict=True)
    ]


def _heads(layer: LayerConfig) -> str:
    pairs = layer.rope.pairs
    return f"{layer.kv_heads} key heads of {layer.head_dim} numbers, {pairs} pairs of them turned"


def _format(
    config: ModelConfig, group: CacheGroup, max_error: float, weights: Mapping[int, Tensor]
) -> KVFormat:
    first = config.layers[group.layers[0]]
    # Windows are told by how far back they reach, not by position, which making keys would need.
    # Where RoPE turns all columns, keys would have to be turned back whole: they are kept.
    made = group.window is None and all(index in weights for index in group.layers)
    made = made and 2 * first.rope.pairs < first.head_dim
    spread = max((_spread(weights[index]) for index in group.layers), default=1.0) if made else 1.0
    kinds = [
        KVFormat(first.kv_heads, first.head_dim, bits, pairs)
        for pairs in ((first.rope.pairs, None) if made else (None,))
        for bits in BITS
    ]
    # A key is off by as much as its value, but for what k_norm's weight makes of it.
    fits = [
        kind
        for kind in kinds
        if kind.worst * (spread if kind.pairs is not None else 1.0) <= max_error
    ]
    assert fits, f"no format holds every vector within {max_error}"
    best = fits[0]
    for kind in fits[1:]:
        sizes = (token_bytes(group, own, second_share(own, max_error)) for own in (kind, best))
        if next(sizes) <= _WORTH * next(sizes):
            best = kind
    return best


def _spread(weight: Tensor) -> float:
    """How many times worse than its value a key is off, if the value is spread over its columns."""
    return float(weight.abs().max() / weight.square().mean().sqrt().clamp(min=1e-30))
