"""Loading: shards, dtypes, ignored tensors; and errors that name the tensors at fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conclave.worker.errors import CheckpointError
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.weights import load_decoder, model_tensors, tensor_map

Checkpoints = Callable[[int | str], Path]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy of variant 4 (shared keys, per-layer embeddings) to spoil."""
    return copy(tiny_checkpoint(4), tmp_path)


def copy(source: Path, target: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, target)
    return target


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(folder, ModelConfig.load(folder), CPU, dtype)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, parts: int) -> list[str]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{part}.safetensors" for part in range(parts)]
    place = {key: names[number % parts] for number, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if place[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def same(first: Decoder, second: Decoder) -> bool:
    ours, theirs = model_tensors(first), model_tensors(second)
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


@pytest.mark.parametrize("variant", ["1", "3", "4", "6", "8", "12", "12-wrapper"])
def test_every_tensor_lands_in_its_rows(variant: str, tiny_checkpoint: Checkpoints) -> None:
    folder = tiny_checkpoint(variant)
    table = tensor_map(ModelConfig.load(folder))
    tensors = model_tensors(load(folder))
    stored = load_file(folder / "model.safetensors")
    covered = dict.fromkeys(tensors, 0)
    for name, value in stored.items():
        short = name.removeprefix("model.").removeprefix("language_model.")
        assert torch.equal(table[short].view(tensors), value), name
        covered[table[short].parameter] += value.numel()
    derived = ("embedding_scale", "per_layer.scale", "head_norm_rows")
    for name, tensor in tensors.items():
        assert name.endswith(derived) or covered[name] == tensor.numel(), name


def test_sharded_and_single_file_agree(folder: Path, tiny_checkpoint: Checkpoints) -> None:
    shard(folder, 3)
    assert same(load(folder), load(tiny_checkpoint(4)))


def test_dtype_is_converted_on_the_way(folder: Path) -> None:
    narrow = load(folder, torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    wide = load(folder)
    assert torch.equal(narrow.embedding.weight, wide.embedding.weight.bfloat16())


def test_progress_counts_the_tensors(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = ModelConfig.load(folder)
    load_decoder(folder, config, CPU, torch.float32, lambda done, total: seen.append((done, total)))
    total = len(tensor_map(config))
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_towers_dead_tensors_and_tied_heads_are_left_on_the_disk(
    folder: Path, tiny_checkpoint: Checkpoints
) -> None:
    extra = [
        "model.vision_tower.encoder.layers.0.weight",
        "model.audio_tower.conv.weight",
        "model.embed_vision.embedding_projection.weight",
        "model.vision_embedder.patch_dense.weight",
        "model.layers.6.self_attn.k_proj.weight",
        "model.layers.6.self_attn.v_proj.weight",
        "model.layers.6.self_attn.k_norm.weight",
        "lm_head.weight",
    ]
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2) for name in extra}))
    assert same(load(folder), load(tiny_checkpoint(4)))


def test_all_faults_are_named_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(4)
        tensors["model.norm.weight"] = torch.ones(65)
        tensors["model.layers.1.layer_scalar"] = torch.ones(1, dtype=torch.int32)

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "1 missing: layers.2.mlp.up_proj.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.norm.weight is [65] F32, expected [64]" in message
    assert "model.layers.1.layer_scalar is [1] I32" in message


def test_many_faults_are_counted(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[:20]])
    with pytest.raises(CheckpointError, match=r"20 missing: .*, \.\.\."):
        load(folder)


def test_value_projection_of_a_k_eq_v_layer_is_unexpected(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = copy(tiny_checkpoint(1), tmp_path)
    name = "model.layers.5.self_attn.v_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(32, 64)}))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.5\.self_attn\.v_proj"):
        load(folder)


def test_one_tensor_under_two_names(folder: Path) -> None:
    name = "model.language_model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"model\.language_model\.norm\.weight"):
        load(folder)


def test_missing_and_broken_files(folder: Path) -> None:
    names = shard(folder, 2)
    (folder / names[0]).write_bytes(b"\x08" * 64)
    with pytest.raises(CheckpointError, match=names[0]):
        load(folder)
    (folder / names[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[0]} does not exist"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": {"a": "../b"}}'], ids=str)
def test_broken_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        load(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        load(folder)
