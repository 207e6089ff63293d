"""Tiny random Gemma 4 checkpoints, written by transformers: the truth our decoder is held to.

One variant for each feature of the five sizes. Norms, layer scalars and expert scales are random,
because their default of 1 hides half of all mistakes; weights are large enough for the softcap.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BASE: dict[str, Any] = {
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
    "vocab_size_per_layer_input": 512,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 256,
}


def layer_types(pattern: str) -> list[str]:
    """`SSF` to transformers' names."""
    return ["sliding_attention" if kind == "S" else "full_attention" for kind in pattern]


def full_rope(**values: float) -> dict[str, Any]:
    """Rope parameters with other settings for the full layers."""
    full = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    local = {"rope_type": "default", "rope_theta": 1e4}
    return {"full_attention": full | values, "sliding_attention": local}


DENSE = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
TWO_TO_ONE = {"layer_types": layer_types("SSFSSF")}
PER_LAYER = {"hidden_size_per_layer_input": 8}
SHARED = PER_LAYER | {"num_kv_shared_layers": 3}
IRREGULAR = {"num_hidden_layers": 7, "layer_types": layer_types("SFSSFSF")}


def experts(count: int, active: int, size: int) -> dict[str, Any]:
    """Settings of a mixture of experts."""
    return {
        "enable_moe_block": True,
        "num_experts": count,
        "top_k_experts": active,
        "moe_intermediate_size": size,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "1": DENSE,
    "2": TWO_TO_ONE | {"num_global_key_value_heads": 1},
    "3": SHARED | {"num_hidden_layers": 8, "layer_types": layer_types("SSSFSSSF")},
    "4": SHARED | IRREGULAR | {"use_double_wide_mlp": True, "num_key_value_heads": 1},
    "5": TWO_TO_ONE | PER_LAYER,
    "5-small-table": TWO_TO_ONE | PER_LAYER | {"vocab_size_per_layer_input": 300},
    "6": DENSE | experts(8, 2, 24),
    "6-wide": DENSE | experts(8, 2, 32),
    "7": TWO_TO_ONE | SHARED | experts(4, 4, 16),
    "8": {
        "layer_types": layer_types("SFSFSF"),
        "final_logit_softcapping": None,
        "tie_word_embeddings": False,
        "rope_parameters": full_rope(partial_rotary_factor=0.5, factor=8.0),
    },
    "9": DENSE | {"sliding_window": 64},
    "10": DENSE
    | {"num_hidden_layers": 2, "layer_types": layer_types("SF")}
    | {"head_dim": 256, "global_head_dim": 512, "num_key_value_heads": 1},
    "11": {"num_hidden_layers": 2, "layer_types": layer_types("FF"), "hidden_size": 80}
    | {"num_attention_heads": 5, "num_key_value_heads": 1},
}
VARIANTS["12"] = VARIANTS["1"]
VARIANTS["12-wrapper"] = VARIANTS["4"]


def reference_class(variant: str) -> Any:
    """The transformers class that writes and reads a variant's checkpoint."""
    import transformers

    if variant == "12":
        return transformers.Gemma4UnifiedForConditionalGeneration
    if variant == "12-wrapper":
        return transformers.Gemma4ForConditionalGeneration
    return transformers.Gemma4ForCausalLM


def reference_config(variant: str) -> Any:
    """A variant's transformers configuration."""
    import transformers

    settings = BASE | VARIANTS[variant]
    towers: dict[str, Any] = {"vision_config": None, "audio_config": None}
    if variant == "12":
        for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            del settings[name]
        unified = transformers.Gemma4UnifiedTextConfig(**settings)
        return transformers.Gemma4UnifiedConfig(text_config=unified, **towers)
    text = transformers.Gemma4TextConfig(**settings)
    if variant == "12-wrapper":
        return transformers.Gemma4Config(text_config=text, **towers)
    return text


def write_checkpoint(variant: str, folder: Path) -> Path:
    """Writes a variant with random weights to `folder`, in transformers' own style."""
    torch.manual_seed(1)
    model = reference_class(variant)(reference_config(variant))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
            elif "embed_tokens" in name or "lm_head" in name:
                tensor.normal_(std=0.3)
            else:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def read_reference(variant: str, folder: Path, **options: Any) -> Any:
    """The reference model of a checkpoint, with no key missing or left over."""
    model, report = reference_class(variant).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model.set_experts_implementation("eager")
    return model.eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | str], Path]:
    """The folder of a variant's checkpoint, written once a session."""
    written: dict[str, Path] = {}

    def folder_of(variant: int | str) -> Path:
        name = str(variant)
        if name not in written:
            written[name] = write_checkpoint(name, tmp_path_factory.mktemp(f"variant-{name}"))
        return written[name]

    return folder_of


@pytest.fixture(scope="session")
def reference_logits(
    tiny_checkpoint: Callable[[int | str], Path],
) -> Callable[[str, list[int]], torch.Tensor]:
    """transformers' float32 logits [T, vocab] of one sequence, from its full forward."""
    models: dict[str, Any] = {}

    def logits_of(variant: str, tokens: list[int]) -> torch.Tensor:
        if variant not in models:
            models[variant] = read_reference(variant, tiny_checkpoint(variant))
        with torch.inference_mode():
            logits: torch.Tensor = models[variant](torch.tensor([tokens])).logits[0]
        return logits

    return logits_of


CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message.role == 'tool' %}{{ raise_exception('no tool turns here') }}{% endif %}\
<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if loop.first and enable_thinking %}<|think|>{% endif %}\
{% if loop.first and tools %}{% for tool in tools %}\
<|tool>{{ tool | tojson }}<tool|>{% endfor %}{% endif %}\
{{ message.content }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""
SPECIAL = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|turn>",
    "<turn|>",
    "<|think|>",
    "<|tool>",
    "<tool|>",
]


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer with one token a byte: byte b is token 16 + b."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    names = [*SPECIAL, *(f"<unused{i}>" for i in range(len(SPECIAL), 16))]
    letters = [_letter_of(byte) for byte in range(256)]
    vocabulary = {name: number for number, name in enumerate([*names, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def _letter_of(byte: int) -> str:
    """The printable character that byte-level BPE writes for a byte (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sorted(set(range(256)) - set(printable)).index(byte))


@pytest.fixture(scope="session")
def text_checkpoint(
    tiny_checkpoint: Callable[[int | str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Variant 1 with a byte tokenizer, a chat template and generation defaults."""
    folder = tmp_path_factory.mktemp("text") / "checkpoint"
    shutil.copytree(tiny_checkpoint(1), folder)
    write_byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    generation = {"eos_token_id": [1, 5], "temperature": 0.5, "top_k": 40}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
