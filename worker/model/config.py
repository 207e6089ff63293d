"""A Gemma 4 text model's shape, read from a checkpoint's config.json.

Pure Python, so that the scheduler can size caches without torch. What varies by layer (window,
heads, rope, whose keys it reads) is resolved here once, into one `LayerConfig` a layer. Missing
keys take transformers' own defaults; settings that this decoder does not compute are refused by
name. What it gave up: attention in both directions, quantized checkpoints, drafters.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..errors import CheckpointError
from .fields import Fields

MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULT_ROPE: dict[str, object] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one layer: pair i turns by position * theta^(-2i / head_dim) / factor."""

    theta: float
    pairs: int
    """How many of the head_dim / 2 pairs turn; the others have angle zero."""
    factor: float


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Mixture of experts beside a layer's dense MLP."""

    count: int
    active: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """All that distinguishes one decoder layer."""

    window: int | None
    """Keys a query sees, itself included; None sees all that went before."""
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    kv_source: int
    """Index of the layer whose keys and values this one reads; its own index when it makes them."""
    has_value_projection: bool
    """False where the values are the raw keys (`attention_k_eq_v`)."""
    rope: RopeConfig
    experts: ExpertsConfig | None

    @property
    def sliding(self) -> bool:
        """Whether the layer sees a window only."""
        return self.window is not None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole text decoder."""

    vocab_size: int
    hidden_size: int
    sliding_window: int
    max_position_embeddings: int
    norm_epsilon: float
    logit_softcap: float | None
    tied_head: bool
    """The output head is the token embedding."""
    per_layer_input_size: int
    """Width of the per-layer embeddings (E2B, E4B); 0 where there are none."""
    per_layer_vocab_size: int
    layers: tuple[LayerConfig, ...]

    @property
    def vocabulary(self) -> int:
        """Token ids that may go in and come out: every table must have a row for them."""
        if not self.per_layer_input_size:
            return self.vocab_size
        return min(self.vocab_size, self.per_layer_vocab_size)

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Reads `folder`/config.json; raises CheckpointError where that cannot be."""
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{path} does not exist: name a checkpoint's folder") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
        return cls.parse(values)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> "ModelConfig":
        """From config.json's content: wrapper (`text_config`) or text-only, Hub or 5.23 style.

        Raises CheckpointError on anything that this decoder would compute wrongly.
        """
        outer = Fields(values)
        fields = outer.section("text_config") if values.get("text_config") is not None else outer
        model_type = values.get("model_type", fields.values.get("model_type"))
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"model_type is {model_type!r}; supported are {', '.join(MODEL_TYPES)}"
            )
        _refuse_unsupported(outer)
        _refuse_unsupported(fields)
        unified = str(model_type).startswith("gemma4_unified")
        tied_inside = fields.flag("tie_word_embeddings", True)
        return cls(
            vocab_size=fields.integer("vocab_size", 262_144),
            hidden_size=fields.integer("hidden_size", 2304),
            sliding_window=_window(fields, unified),
            max_position_embeddings=fields.integer(
                "max_position_embeddings", 262_144 if unified else 131_072
            ),
            norm_epsilon=fields.number("rms_norm_eps", 1e-6),
            logit_softcap=fields.optional_number("final_logit_softcapping"),
            tied_head=outer.flag("tie_word_embeddings", tied_inside),
            per_layer_input_size=fields.integer(
                "hidden_size_per_layer_input", 0 if unified else 256, minimum=0
            ),
            per_layer_vocab_size=fields.integer("vocab_size_per_layer_input", 262_144),
            layers=_layers(fields, unified),
        )


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose keys and values live and die together: one block table serves them all."""

    window: int | None
    layers: tuple[int, ...]
    """The layers that own keys and values; layers that read theirs are not listed."""
    values_per_token: int
    """Numbers cached for one token, keys and values of all the group's layers."""

    def bytes_per_token(self, dtype_size: int) -> int:
        """Bytes cached for one token when a number takes `dtype_size` bytes."""
        return self.values_per_token * dtype_size


def cache_groups(config: ModelConfig) -> tuple[CacheGroup, ...]:
    """The full-attention group, then the sliding one, whichever exist."""
    groups = []
    for sliding in (False, True):
        members = [
            (index, layer)
            for index, layer in enumerate(config.layers)
            if layer.sliding is sliding and layer.kv_source == index
        ]
        if members:
            values = sum(2 * layer.kv_heads * layer.head_dim for _, layer in members)
            indices = tuple(index for index, _ in members)
            groups.append(CacheGroup(members[0][1].window, indices, values))
    return tuple(groups)


def _refuse_unsupported(fields: Fields) -> None:
    """Refuses what would be computed wrongly, rather than ignoring it."""
    if fields.values.get("quantization_config") is not None:
        raise CheckpointError(
            "config.json: quantization_config is set; `conclave import` it first, or use the "
            "unquantized checkpoint"
        )
    if fields.flag("attention_bias", False):
        raise fields.error("attention_bias", "must be false")
    activation = fields.values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise fields.error("hidden_activation", "must be gelu_pytorch_tanh")
    if fields.values.get("use_bidirectional_attention") not in (None, "vision"):
        raise fields.error("use_bidirectional_attention", "must be null or 'vision'")


def _window(fields: Fields, unified: bool) -> int:
    return fields.integer("sliding_window", 1024 if unified else 512)


def _layer_types(fields: Fields) -> list[str]:
    """`layer_types`, by default five sliding to one full; as in transformers the last is full."""
    count = fields.integer("num_hidden_layers", 30)
    types = fields.values.get("layer_types")
    if types is None:
        types = [SLIDING if (index + 1) % 6 else FULL for index in range(count)]
    if (
        not isinstance(types, list)
        or len(types) != count
        or any(name not in (SLIDING, FULL) for name in types)
    ):
        raise fields.error("layer_types", f"must list {count} of {SLIDING!r} or {FULL!r}")
    return [*cast("list[str]", types)[:-1], FULL]


def _kv_sources(fields: Fields, types: list[str]) -> list[int]:
    """For each layer the one whose keys and values it reads (`num_kv_shared_layers`)."""
    shared = fields.integer("num_kv_shared_layers", 0, minimum=0)
    first = len(types) - shared
    sources = list(range(len(types)))
    for index in range(max(first, 0), len(types)):
        owners = [owner for owner in range(first) if types[owner] == types[index]]
        if not owners:
            raise fields.error(
                "num_kv_shared_layers", f"must leave a {types[index]} layer with its own keys"
            )
        sources[index] = owners[-1]
    return sources


def _attention_sizes(fields: Fields, types: list[str]) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of each layer, from `per_layer_config` or the older global keys.

    The older keys are global_head_dim and num_global_key_value_heads; the latter counts only with
    attention_k_eq_v. Newer transformers write per_layer_config, and then the older do not count.
    """
    local = (fields.integer("num_key_value_heads", 4), fields.integer("head_dim", 256))
    if fields.values.get("per_layer_config") is None:
        kv_heads = local[0]
        gated = fields.flag("attention_k_eq_v", False)
        if gated and fields.values.get("num_global_key_value_heads") is not None:
            kv_heads = fields.integer("num_global_key_value_heads")
        whole = (kv_heads, fields.integer("global_head_dim", 512))
        return [local if name == SLIDING else whole for name in types]
    overrides = fields.section("per_layer_config")
    indices = {str(index) for index in range(len(types))}
    if strangers := sorted(set(overrides.values) - indices):
        raise fields.error("per_layer_config", f"must name layers only (found {strangers})")
    sizes = [local] * len(types)
    for index in overrides.values:
        layer = overrides.section(index)
        if strangers := sorted(set(layer.values) - {"head_dim", "num_key_value_heads"}):
            raise overrides.error(index, f"may not override {strangers}")
        sizes[int(index)] = (
            layer.integer("num_key_value_heads", local[0]),
            layer.integer("head_dim", local[1]),
        )
    return sizes


def _rope(fields: Fields, layer_type: str, head_dim: int) -> RopeConfig:
    given = fields.values.get("rope_parameters")
    ropes = Fields(DEFAULT_ROPE) if given is None else fields.section("rope_parameters")
    rope = ropes.section(layer_type)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    theta = rope.number("rope_theta")
    if kind == "default":
        return RopeConfig(theta, head_dim // 2, 1.0)
    if kind != "proportional":
        raise rope.error("rope_type", "must be default or proportional")
    share = rope.number("partial_rotary_factor", 1.0)
    if share > 1:
        raise rope.error("partial_rotary_factor", "must be at most 1")
    return RopeConfig(theta, int(share * head_dim // 2), rope.number("factor", 1.0))


def _experts(fields: Fields) -> ExpertsConfig | None:
    if not fields.flag("enable_moe_block", False):
        return None
    count = fields.integer("num_experts")
    active = fields.integer("top_k_experts")
    if active > count:
        raise fields.error("top_k_experts", f"must be at most num_experts ({count})")
    return ExpertsConfig(count, active, fields.integer("moe_intermediate_size"))


def _layers(fields: Fields, unified: bool) -> tuple[LayerConfig, ...]:
    types = _layer_types(fields)
    sources = _kv_sources(fields, types)
    sizes = _attention_sizes(fields, types)
    heads = fields.integer("num_attention_heads", 8)
    intermediate = fields.integer("intermediate_size", 9216)
    wide = fields.flag("use_double_wide_mlp", False)
    k_eq_v = fields.flag("attention_k_eq_v", False)
    layers = []
    for index, (name, source, (kv_heads, head_dim)) in enumerate(
        zip(types, sources, sizes, strict=True)
    ):
        if heads % kv_heads:
            raise fields.error("num_attention_heads", f"must be a multiple of {kv_heads} kv heads")
        if head_dim % 2 or sizes[source] != (kv_heads, head_dim):
            raise fields.error("head_dim", f"of layer {index} must be even and that of its source")
        layers.append(
            LayerConfig(
                window=_window(fields, unified) if name == SLIDING else None,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                intermediate_size=intermediate * (2 if wide and source != index else 1),
                kv_source=source,
                has_value_projection=name == SLIDING or not k_eq_v,
                rope=_rope(fields, name, head_dim),
                experts=_experts(fields),
            )
        )
    return tuple(layers)
