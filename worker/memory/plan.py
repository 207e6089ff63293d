"""How a memory budget is divided up: weights, slots, cache, one step. A pure function of sizes.

Weights come first: if all fit beside the smallest cache and the worst step, all stay, and the cache
gets the rest. Else the cache gets a share in which several sequences run together. If experts may
be streamed and those of one layer have room beside all else, they get slots for what is left; else
whole layers are streamed until the budget holds, in a shorter code if that makes steps faster. What
is left over is the cache's again. Sizes of codes are those that follow from shapes, the most that
they take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import EngineConfig
from ..errors import ConfigError
from ..model.config import ModelConfig, cache_groups
from ..model.storage import Storage
from ..scheduling.sizing import HOST_BUFFER, LANES, cache_bytes, context_of, enough_gib
from ..scheduling.workspace import workspace
from .experts.slots import ExpertSlots, choose_slots, fewest_slots
from .residency import Residency, choose, choose_cheaper, least, least_of_either

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
    """Of whole layers, without their experts if these have slots."""
    ahead: int
    """Layers that are copied ahead of the one that runs; if 0, no expert is foreseen either."""
    experts: ExpertSlots | None = None
    """Where single experts come from the host."""

    @property
    def weights(self) -> int:
        """Of layers that stay, and of slots."""
        return self.residency.bytes + (0 if self.experts is None else self.experts.bytes)


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    storage: Storage,
    budget: int,
    dtype_size: int,
    token_bytes: Sequence[int],
    library: int = 0,
) -> Plan:
    """Divide `budget` bytes up.

    Args:
        config: says how much runs in one step, and how far ahead copies are made.
        model: its shape.
        storage: of its weights.
        budget: bytes on the device.
        dtype_size: bytes of one number of the model's dtype.
        token_bytes: what one token takes in each cache group.
        library: bytes that a library of products takes for each stream that multiplies.

    Raises:
        ConfigError: no residency fits; says what the least budget is.
    """
    context = context_of(config, model.max_position_embeddings)
    step = workspace(config, model, context, dtype_size, storage.expanded)
    step += library * _multiplying(config, storage)
    if config.kv_host_gib is not None:
        step += max(HOST_BUFFER, *(LANES * each * config.block_size for each in token_bytes))
    groups, limit = cache_groups(model), model.max_position_embeddings
    one, wanted = cache_bytes(config, groups, limit, token_bytes)
    ahead, left = config.knobs.ahead, budget - storage.rest - step
    rooms = left - max(one, min(wanted, left // _CACHE_SHARE)), left - one
    found = _place(storage, rooms, ahead, config)
    if found is None:
        parts = {
            "weights that always stay": storage.rest,
            "layers that are streamed": _least(storage, ahead, config),
            "one step": step,
            "the cache of one sequence": one,
        }
        raise ConfigError(_too_small(budget, parts))
    residency, slots = found
    plan = Plan(budget, storage.rest, step, 0, residency, ahead, slots)
    return replace(plan, cache=left - plan.weights)


def _multiplying(config: EngineConfig, storage: Storage) -> int:
    """Streams on which products run: experts are foreseen on one of their own."""
    foreseen = config.stream_experts and any(layer.experts for layer in storage.layers)
    return 2 if foreseen and config.knobs.ahead else 1


def _place(
    storage: Storage, rooms: tuple[int, int], ahead: int, config: EngineConfig
) -> tuple[Residency, ExpertSlots | None] | None:
    """Layers, and slots for experts, in the first of `rooms` that has any; all stay in the last."""
    blocks = [layer.block for layer in storage.layers]
    if sum(blocks) <= rooms[-1]:
        return Residency(tuple(blocks)), None
    for room in rooms if config.stream_experts else ():
        if slots := choose_slots(storage.layers, room):
            return Residency(_beside_experts(storage)), slots
    for room in rooms:
        if residency := _whole(storage, room, ahead, config):
            return residency, None
    return None


def _whole(storage: Storage, room: int, ahead: int, config: EngineConfig) -> Residency | None:
    """Whole layers in so many bytes."""
    blocks = [layer.block for layer in storage.layers]
    if config.stream_coded:
        coded = [layer.coded_modules for layer in storage.layers]
        return choose_cheaper(blocks, coded, storage.largest_module, room, ahead)
    return choose(blocks, room, ahead)


def _least(storage: Storage, ahead: int, config: EngineConfig) -> int:
    """The fewest bytes that `_place` can do with."""
    blocks = [layer.block for layer in storage.layers]
    found = [least(blocks, ahead)]
    if config.stream_coded:
        coded = [layer.coded_modules for layer in storage.layers]
        found = [least_of_either(blocks, coded, storage.largest_module, ahead)]
    if config.stream_experts and (slots := fewest_slots(storage.layers)):
        found.append(sum(_beside_experts(storage)) + slots.bytes)
    return min(found)


def _beside_experts(storage: Storage) -> tuple[int, ...]:
    return tuple(layer.block - layer.expert_block for layer in storage.layers)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.3g} GiB"


def _too_small(budget: int, parts: dict[str, int]) -> str:
    listed = ", ".join(f"{gib(size)} {name}" for name, size in parts.items())
    return (
        f"knobs.memory_budget is {gib(budget)}, but the least for this model is "
        f"{enough_gib(sum(parts.values()))} GiB ({listed}); raise it, or lower max_step_tokens, "
        "max_sequences, max_context or knobs.prefetch, or make the weights smaller (the knobs "
        "weight_bits and sparsity, or `conclave compress`)"
    )
