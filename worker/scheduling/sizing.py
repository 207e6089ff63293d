"""How many cache blocks each group gets: a pure function of settings, model and memory.

Sliding layers need at most their window plus one chunk for each running sequence, however long the
context is; so they get just that, and full-attention layers share the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from operator import mul

from ..config import EngineConfig
from ..errors import ConfigError
from ..model.config import CacheGroup

_DEFAULT_CONTEXT = 8192
HOST_BUFFER = 1 << 24
"""Bytes on the device that blocks pass on their way to the host and back, or a block's in each of
its lanes if that is more."""
LANES = 2
"""Parts of that buffer, each filled while the other is emptied."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The longest context and the blocks of each cache group."""

    max_context: int
    blocks: tuple[int, ...]
    bytes: int
    host: tuple[int, ...] = ()
    """Blocks of each group in host memory, if any is set aside for them."""


def plan_cache(
    config: EngineConfig,
    groups: Sequence[CacheGroup],
    model_context: int,
    token_bytes: Sequence[int],
    memory: int,
) -> CachePlan:
    """Divide the cache's memory among the groups.

    Args:
        config: the engine's settings; `kv_tokens` or `kv_memory_gib` override `memory`.
        groups: the model's cache groups.
        model_context: `max_position_embeddings`.
        token_bytes: what one token takes in each group.
        memory: bytes that the cache may use, of a budget if there is one.

    Raises:
        ConfigError: the context is longer than the model's, or the cache too small to hold it.
    """
    context = context_of(config, model_context)
    size = config.block_size
    block_bytes = [each * size for each in token_bytes]
    least = [_blocks_of_one(group, context, config) for group in groups]
    wanted = [count * config.max_sequences for count in least]
    if config.kv_tokens is not None:
        blocks = [config.kv_tokens // size] * len(groups)
        blocks = [
            count if group.window is None else min(max(count, need), want)
            for count, group, need, want in zip(blocks, groups, least, wanted, strict=True)
        ]
    else:
        if config.kv_memory_gib is not None:
            memory = int(config.kv_memory_gib * 2**30)
        blocks = _share(memory, block_bytes, wanted)
    budgeted = config.knobs.memory_budget is not None
    remedy = "knobs.memory_budget" if budgeted else "kv_tokens or kv_memory_gib"
    for have, need in zip(blocks, least, strict=True):
        if have < need:
            raise ConfigError(
                f"the KV cache has room for {have * size} tokens, but max_context {context} needs "
                f"{need * size}; raise {remedy}, or lower max_context"
            )
    total = sum(count * each for count, each in zip(blocks, block_bytes, strict=True))
    host = plan_host(config, groups, context, token_bytes)
    return CachePlan(context, tuple(blocks), total, host)


def plan_host(
    config: EngineConfig, groups: Sequence[CacheGroup], context: int, token_bytes: Sequence[int]
) -> tuple[int, ...]:
    """Blocks of each cache group in `kv_host_gib` of host memory; empty if that is not set.

    Whole sequences of `context` tokens, and a part of one. Raises ConfigError if not even a block
    of each group fits.
    """
    if config.kv_host_gib is None:
        return ()
    blocks = [_blocks_of_one(group, context, config) for group in groups]
    one = config.block_size * sum(map(mul, blocks, token_bytes))
    memory = int(config.kv_host_gib * 2**30)
    slots = tuple(memory * count // one for count in blocks)
    if 0 in slots:
        raise ConfigError(
            f"kv_host_gib {config.kv_host_gib} holds no block of each kind of layer: give at least "
            f"{enough_gib(-(-one // min(blocks)))}"
        )
    return slots


def cache_bytes(
    config: EngineConfig,
    groups: Sequence[CacheGroup],
    model_context: int,
    token_bytes: Sequence[int],
) -> tuple[int, int]:
    """What `plan_cache` needs for one sequence, and the most that it makes use of."""
    context = context_of(config, model_context)
    blocks = [_blocks_of_one(group, context, config) for group in groups]
    one = config.block_size * sum(map(mul, blocks, token_bytes))
    return one, one * config.max_sequences


def context_of(config: EngineConfig, model_context: int) -> int:
    """The longest prompt plus answer in tokens; ConfigError if that is more than the model's."""
    context = config.max_context or min(model_context, _DEFAULT_CONTEXT)
    if context > model_context:
        raise ConfigError(f"max_context {context} is over the model's limit of {model_context}")
    return context


def enough_gib(size: int) -> str:
    """The GiB to give where so many bytes are needed: three digits, never less than that."""
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).divide(size, 2**30)):.3g}"


def _blocks_of_one(group: CacheGroup, context: int, config: EngineConfig) -> int:
    """Most blocks that one sequence can hold in this group."""
    size = config.block_size
    whole = -(-context // size)
    if group.window is None:
        return whole
    # The window and the chunk may each begin and end in the middle of a block.
    return min(whole, -(-(group.window - 1 + config.max_step_tokens) // size) + 2)


def _share(memory: int, block_bytes: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Shrink all groups by one factor until they fit; nobody gets more than they want."""
    total = sum(count * each for count, each in zip(wanted, block_bytes, strict=True))
    return [min(count, count * memory // total) for count in wanted]
