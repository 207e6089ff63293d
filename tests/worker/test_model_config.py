"""config.json in its spellings becomes one `ModelConfig`; what we cannot compute is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conclave.worker.errors import CheckpointError
from conclave.worker.model.config import ModelConfig, cache_groups

TINY: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
}


def test_defaults_are_those_of_transformers() -> None:
    config = ModelConfig.parse(TINY)
    assert [layer.sliding for layer in config.layers] == [True] * 5 + [False]
    assert [layer.head_dim for layer in config.layers] == [16] * 5 + [32]
    assert [layer.kv_source for layer in config.layers] == list(range(6))
    assert config.max_position_embeddings == 131_072
    assert config.logit_softcap is None and config.tied_head
    local, full = config.layers[0].rope, config.layers[5].rope
    assert (local.theta, local.pairs, local.factor) == (1e4, 8, 1.0)
    assert (full.theta, full.pairs, full.factor) == (1e6, 4, 1.0)


def test_hub_style_and_per_layer_style_agree() -> None:
    values = TINY | {"attention_k_eq_v": True}
    hub = ModelConfig.parse(values | {"num_global_key_value_heads": 1})
    overrides = {"5": {"head_dim": 32, "num_key_value_heads": 1}}
    # The older key counts for nothing once per_layer_config is there.
    newer = ModelConfig.parse(values | {"per_layer_config": overrides, "global_head_dim": 512})
    assert hub == newer
    assert [layer.kv_heads for layer in hub.layers] == [2] * 5 + [1]
    assert [layer.has_value_projection for layer in hub.layers] == [True] * 5 + [False]


def test_global_kv_heads_count_only_with_k_eq_v() -> None:
    config = ModelConfig.parse(TINY | {"num_global_key_value_heads": 1})
    assert config.layers[5].kv_heads == 2


def test_wrapper_config() -> None:
    inner = {name: value for name, value in TINY.items() if name != "model_type"}
    wrapped = ModelConfig.parse({"model_type": "gemma4", "text_config": inner})
    assert wrapped == ModelConfig.parse(TINY)
    unified = ModelConfig.parse(
        {"model_type": "gemma4_unified", "text_config": TINY, "tie_word_embeddings": False}
    )
    assert unified.max_position_embeddings == 262_144 and not unified.tied_head


def test_shared_keys_come_from_the_last_own_layer_of_the_kind() -> None:
    pattern = [f"{kind}_attention" for kind in "sliding full sliding sliding full sliding".split()]
    config = ModelConfig.parse(
        TINY
        | {"num_hidden_layers": 7, "layer_types": [*pattern, "sliding_attention"]}
        | {"num_kv_shared_layers": 3, "use_double_wide_mlp": True}
    )
    assert [layer.kv_source for layer in config.layers] == [0, 1, 2, 3, 1, 3, 1]
    assert not config.layers[6].sliding  # the last layer is full whatever the file says
    assert [layer.intermediate_size for layer in config.layers] == [96] * 4 + [192] * 3
    assert [group.layers for group in cache_groups(config)] == [(1,), (0, 2, 3)]


def test_cache_groups() -> None:
    full, sliding = cache_groups(ModelConfig.parse(TINY))
    assert (full.window, full.layers, full.values_per_token) == (None, (5,), 2 * 2 * 32)
    assert (sliding.window, sliding.layers) == (8, (0, 1, 2, 3, 4))
    assert sliding.bytes_per_token(2) == 2 * 5 * 2 * 2 * 16
    only_full = TINY | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    assert [group.window for group in cache_groups(ModelConfig.parse(only_full))] == [None]


def test_rope_settings() -> None:
    full = {"type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": 0.5, "factor": 8}
    local = {"rope_type": "default", "rope_theta": 2e4}
    ropes = {"full_attention": full, "sliding_attention": local}
    config = ModelConfig.parse(TINY | {"rope_parameters": ropes})
    rope = config.layers[5].rope
    assert (rope.theta, rope.pairs, rope.factor) == (5e5, 8, 8.0)
    assert config.layers[0].rope.theta == 2e4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": None}, "model_type"),
        ({"text_config": 3}, "text_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 6}, "layer_types"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"per_layer_config": {"9": {}}}, "per_layer_config"),
        ({"per_layer_config": {"5": {"hidden_size": 3}}}, "hidden_size"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "sliding_attention"),
        ({"enable_moe_block": True, "num_experts": 4}, "top_k_experts"),
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5}, "top_k_experts"),
    ],
    ids=str,
)
def test_refusals_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.parse(TINY | change)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_unknown_rope_is_refused(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e6, "factor": 2.0}
    ropes = {"full_attention": rope, "sliding_attention": rope}
    with pytest.raises(CheckpointError, match=kind):
        ModelConfig.parse(TINY | {"rope_parameters": ropes})


@pytest.mark.parametrize("content", [None, "{", "[]", "\x00"], ids=repr)
def test_load_refuses_what_is_no_config(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert ModelConfig.load(tmp_path) == ModelConfig.parse(TINY)


def test_reading_a_config_needs_no_torch() -> None:
    root = Path(__file__).parents[2] / ".root"
    code = "import conclave.worker.model.config, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root)})
