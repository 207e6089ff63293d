"""The checkpoint: fresh weights, and weights on disk as published Gemma 4 models have them.

Given up: the optimizer's state; a run that stopped cannot be resumed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from conclave.worker.compress.interchange.exporter import export_checkpoint
from conclave.worker.compress.manifest import MANIFEST

from .architecture import GENERATION_CONFIG
from .experts import EVERY_EXPERT
from .files import RouteError, write_json, written_by

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def new_model(shape: dict[str, Any], seed: int) -> torch.nn.Module:
    """A model of this config.json with fresh weights in float32.

    Gemma 4 multiplies queries and keys without a scale, so the norms of both start at a value
    that gives scores of unit variance.
    """
    torch.manual_seed(seed)
    config = transformers.Gemma4TextConfig.from_dict(dict(shape))
    model = transformers.Gemma4ForCausalLM(config)
    model.set_experts_implementation(EVERY_EXPERT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(parameter.numel() ** -0.25)
    fresh: torch.nn.Module = model
    return fresh


def save_checkpoint(model: torch.nn.Module, shape: dict[str, Any], folder: Path) -> int:
    """Write the bfloat16 weights and both configurations; returns the size of the weights.

    The configuration is written by hand: transformers writes `per_layer_config` in some versions,
    where published Gemma 4 models have `global_head_dim` and `num_global_key_value_heads`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    path = folder / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    write_json(folder / "config.json", shape)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    return path.stat().st_size


def copy_text_files(source: Path, folder: Path) -> None:
    """Put another model's tokenizer and chat template into the folder, byte for byte."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEXT_FILES:
        if source.resolve() != folder.resolve():
            shutil.copy(written_by("tokenizer", source / name), folder)


def load_model(folder: Path) -> torch.nn.Module:
    """The saved checkpoint in float32, be it compressed; refuses one whose tensors do not match
    the configuration."""
    if (folder / MANIFEST).exists():
        with tempfile.TemporaryDirectory() as temporary:
            plain = Path(temporary) / "plain"
            export_checkpoint(folder, plain, "dense", exact=True)
            return load_model(plain)
    loader: Any = transformers.Gemma4ForCausalLM
    model, report = loader.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise RouteError(f"{folder} does not load as it should: {wrong}")
    loaded: torch.nn.Module = model.eval()
    return loaded
