"""config.json on its way out and in: of the text alone, with how weights are quantized or without.

A wrapper's config goes out as that of its text model, since towers are not exported and loaders
would make up weights for them. The original lies beside it for the way back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .schemes import KEY

CONFIG = "config.json"
ORIGINAL = "conclave-config.json"
"""In an exported folder: config.json as it was."""

_CLASSES = {
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
}
_OUTER = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
"""What a wrapper may tell for its text model, which then does not."""


def read_config(path: Path) -> dict[str, Any]:
    """The object in a config.json; CheckpointError if it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: name a checkpoint's folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values


def of_text(values: Mapping[str, Any], quantization: dict[str, object] | None) -> dict[str, Any]:
    """The config of the text model, with this `quantization_config` or none."""
    inner = values.get("text_config") or values
    text = {name: values[name] for name in _OUTER if name in values} | dict(inner)
    if "tie_word_embeddings" in values:
        text["tie_word_embeddings"] = values["tie_word_embeddings"]
    kind = str(values.get("model_type", text.get("model_type"))).removesuffix("_text") + "_text"
    text |= {"model_type": kind, "architectures": [_CLASSES[kind]]}
    return text if quantization is None else text | {KEY: quantization}


def without_quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model when it is not quantized; either object may have the section."""
    own = {name: value for name, value in values.items() if name != KEY}
    if isinstance(own.get("text_config"), dict):
        own["text_config"] = {n: v for n, v in own["text_config"].items() if n != KEY}
    return own


def text_of(values: Mapping[str, Any]) -> str:
    """As it is stored."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
