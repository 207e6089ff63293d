"""Shapes of the two large Gemma 4 models, for plans and benchmarks without a checkpoint."""

from typing import Any

from ..model.config import FULL, SLIDING, ModelConfig

_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "attention_k_eq_v": True,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "vocab_size": 262_144,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 262_144,
}
_OWN: dict[str, dict[str, Any]] = {
    "31b": {
        "num_hidden_layers": 60,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
    "26b": {
        "num_hidden_layers": 30,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
}
NAMES = tuple(_OWN)


def shape_settings(name: str, layers: int | None = None) -> dict[str, Any]:
    """The content of config.json of one of `NAMES`, or of its first so many layers."""
    settings = _COMMON | _OWN[name]
    count = layers or settings["num_hidden_layers"]
    types = [FULL if (index + 1) % 6 == 0 else SLIDING for index in range(count)]
    return settings | {"num_hidden_layers": count, "layer_types": types}


def shape_of(name: str, layers: int | None = None) -> ModelConfig:
    """The same, read; the last layer is always full."""
    return ModelConfig.parse(shape_settings(name, layers))
