"""How a memory budget is divided up: weights, slots, cache, one step. A pure function of sizes.

Weights come first: if all fit beside the smallest cache and the worst step, all stay, and the cache
gets the rest. Else the cache gets a share in which several sequences run together, as far as the
least that weights can do with leaves it. If experts may be streamed and those of one layer have
room beside all else, they get slots for what is left; else whole layers are streamed until the
budget holds, in a shorter code if that makes steps faster. What is left over is the cache's again.
Sizes of codes are those that follow from shapes, the most that they take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import EngineConfig
from ..errors import ConfigError
from ..model.config import ModelConfig, cache_groups
from ..model.storage import Storage
from ..scheduling.sizing import HOST_BUFFER, LANES, cache_bytes, context_of, enough_gib
from ..scheduling.workspace import recordings, workspace
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
    graphs: bool = False,
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
        graphs: whether decode steps are recorded, on a stream of their own.

    Raises:
        ConfigError: no residency fits; says what the least budget is.
    """
    context = context_of(config, model.max_position_embeddings)
    step = workspace(config, model, context, dtype_size, storage.expanded)
    step += library * _multiplying(config, storage)
    if graphs:
        step += library + recordings(config, model, context, dtype_size)
    if config.kv_host_gib is not None:
        step += max(HOST_BUFFER, *(LANES * each * config.block_size for each in token_bytes))
    groups, limit = cache_groups(model), model.max_position_embeddings
    one, wanted = cache_bytes(config, groups, limit, token_bytes)
    left = budget - storage.rest - step
    room = left - max(one, min(wanted, left // _CACHE_SHARE))
    found = _place(model, storage, room, left - one, config)
    if found is None:
        parts = {
            "weights that always stay": storage.rest,
            "layers that are streamed": _least(storage, config),
            "one step": step,
            "the cache of one sequence": one,
        }
        raise ConfigError(_too_small(budget, parts))
    residency, slots = found
    plan = Plan(budget, storage.rest, step, 0, residency, config.knobs.ahead, slots)
    return replace(plan, cache=left - plan.weights)


def _multiplying(config: EngineConfig, storage: Storage) -> int:
    """Streams on which products run: experts are foreseen on one of their own."""
    foreseen = config.stream_experts and any(layer.experts for layer in storage.layers)
    return 2 if foreseen and config.knobs.ahead else 1


def _place(
    model: ModelConfig, storage: Storage, room: int, most: int, config: EngineConfig
) -> tuple[Residency, ExpertSlots | None] | None:
    """Layers, and slots for experts, in `room` bytes, or in the least if that is more.

    All layers stay if `most` bytes are enough for them; None if not even the least is there. More
    room never makes a step of one token slower.
    """
    blocks = [layer.block for layer in storage.layers]
    if sum(blocks) <= most:
        return Residency(tuple(blocks)), None
    fewest = _least_of_slots(storage, config)
    if fewest is not None and fewest <= most:
        if slots := choose_slots(storage.layers, max(room, fewest)):
            return Residency(_beside_experts(storage)), slots
    fewest = _least_of_layers(storage, config)
    if fewest > most:
        return None
    residency = _whole(model, storage, max(room, fewest), config)
    assert residency is not None, "the least has room"
    return residency, None


def _whole(
    model: ModelConfig, storage: Storage, room: int, config: EngineConfig
) -> Residency | None:
    """Whole layers in so many bytes."""
    blocks = [layer.block for layer in storage.layers]
    if config.stream_coded:
        layers = zip(model.layers, storage.layers, strict=True)
        read = sum(stored.read(1, layer.experts) for layer, stored in layers)
        coded = [layer.coded_modules for layer in storage.layers]
        sizes = blocks, coded, storage.largest_module
        return choose_cheaper(*sizes, room, config.knobs.ahead, read)
    return choose(blocks, room, config.knobs.ahead)


def _least(storage: Storage, config: EngineConfig) -> int:
    """The fewest bytes that `_place` can do with."""
    layers, slots = _least_of_layers(storage, config), _least_of_slots(storage, config)
    return layers if slots is None else min(layers, slots)


def _least_of_layers(storage: Storage, config: EngineConfig) -> int:
    """Of whole layers."""
    blocks = [layer.block for layer in storage.layers]
    if config.stream_coded:
        coded = [layer.coded_modules for layer in storage.layers]
        return least_of_either(blocks, coded, storage.largest_module, config.knobs.ahead)
    return least(blocks, config.knobs.ahead)


def _least_of_slots(storage: Storage, config: EngineConfig) -> int | None:
    """Where experts have slots; None if they have none."""
    slots = fewest_slots(storage.layers) if config.stream_experts else None
    return None if slots is None else sum(_beside_experts(storage)) + slots.bytes


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
