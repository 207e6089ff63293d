"""How a memory budget is divided up: weights, slots, cache, one step. A pure function of sizes.

Weights come first: if all fit beside the smallest cache and the worst step, all stay, and the cache
gets the rest. Else the cache gets a share in which several sequences run together, layers are
streamed until the budget holds, and what is left over is the cache's again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import EngineConfig
from ..errors import ConfigError
from ..model.config import ModelConfig, cache_groups
from ..model.storage import Storage
from ..scheduling.sizing import HOST_BUFFER, cache_bytes, context_of
from ..scheduling.workspace import workspace
from .residency import Residency, choose, least

_CACHE_SHARE = 4
"""A cache that may want more gets this part of what weights that can be streamed could use."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A budget, in bytes."""

    budget: int
    rest: int
    """Weights that always stay: embeddings, head, norms, routers."""
    step: int
    """The worst step's workspace."""
    cache: int
    """All that is left for keys and values."""
    residency: Residency
    ahead: int
    """Layers that are copied ahead of the one that runs."""


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    storage: Storage,
    budget: int,
    dtype_size: int,
    token_bytes: Sequence[int],
) -> Plan:
    """Divide `budget` bytes up.

    Args:
        config: says how much runs in one step, and how far ahead copies are made.
        model: its shape.
        storage: of its weights.
        budget: bytes on the device.
        dtype_size: bytes of one number of the model's dtype.
        token_bytes: what one token takes in each cache group.

    Raises:
        ConfigError: no residency fits; says what the least budget is.
    """
    context = context_of(config, model.max_position_embeddings)
    step = workspace(config, model, context, dtype_size, storage.expanded)
    if config.kv_host_gib is not None:
        step += max(HOST_BUFFER, *(each * config.block_size for each in token_bytes))
    groups, limit = cache_groups(model), model.max_position_embeddings
    one, wanted = cache_bytes(config, groups, limit, token_bytes)
    blocks = [layer.block for layer in storage.layers]
    ahead, left = config.knobs.ahead, budget - storage.rest - step
    found = None
    if sum(blocks) + one > left:
        found = choose(blocks, left - max(one, min(wanted, left // _CACHE_SHARE)), ahead)
    found = found or choose(blocks, left - one, ahead)
    if found is None:
        parts = {
            "weights that always stay": storage.rest,
            "layers that are streamed": least(blocks, ahead),
            "one step": step,
            "the cache of one sequence": one,
        }
        raise ConfigError(_too_small(budget, parts))
    return Plan(budget, storage.rest, step, left - found.bytes, found, ahead)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.3g} GiB"


def _too_small(budget: int, parts: dict[str, int]) -> str:
    listed = ", ".join(f"{gib(size)} {name}" for name, size in parts.items())
    return (
        f"knobs.memory_budget is {gib(budget)}, but the least for this model is "
        f"{gib(sum(parts.values()))} ({listed}); raise it, or lower max_step_tokens, "
        "max_sequences, max_context or knobs.prefetch, or make the weights smaller (the knobs "
        "weight_bits and sparsity, or `conclave compress`)"
    )
