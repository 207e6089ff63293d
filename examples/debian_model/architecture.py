"""The architecture: a Gemma 4 decoder that is real in every part, and small enough for git.

Sliding and full layers, keys used as values in the full ones, softcap and a tied head. `shapes.py`
has what other shapes change. Given up: images, and positions over 2,048.
"""

from __future__ import annotations

from typing import Any

VOCABULARY_SIZE = 8192
MAXIMUM_POSITIONS = 2048

SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>", "<|channel>",
    "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>',
)  # fmt: skip
PAD, EOS, BOS, END_OF_TURN = 0, 1, 2, SPECIAL_TOKENS.index("<turn|>")

CONFIG: dict[str, Any] = {  # of the dense shape
    "architectures": ["Gemma4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": BOS,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": EOS,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 128,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 256,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 960,
    "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    "max_position_embeddings": MAXIMUM_POSITIONS,
    "model_type": "gemma4_text",
    "num_attention_heads": 4,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "sliding_window": 128,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": VOCABULARY_SIZE,
    "vocab_size_per_layer_input": VOCABULARY_SIZE,
}
GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": BOS,
    "do_sample": True,
    "eos_token_id": [EOS, END_OF_TURN],
    "pad_token_id": PAD,
    "temperature": 0.7,
    "top_k": 64,
    "top_p": 0.95,
}
