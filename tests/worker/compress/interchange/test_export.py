"""What stock loaders make of an exported checkpoint: transformers with compressed-tensors."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.utils.helpers import pack_bitmasks, unpack_bitmasks
from safetensors.torch import load_file

from conclave.worker import Engine
from conclave.worker.compress.interchange.exporter import STYLES, Style, export_checkpoint
from conclave.worker.compress.interchange.importer import import_checkpoint
from conclave.worker.compress.interchange.maps import FILE, Maps, MapWriter
from conclave.worker.compress.interchange.seal import SEAL, check_seal
from conclave.worker.compress.interchange.words import of_words, to_words
from conclave.worker.errors import CheckpointError, ConfigError
from conclave.worker.weights import model_tensors, tensor_map

from .conftest import (
    Compressed,
    Exported,
    compress_somehow,
    compressed_decoder,
    content,
    logits_of,
    stock_logits,
    stock_model,
    tensors_of,
)

SMALL: dict[str, Any] = {"max_context": 96, "kv_tokens": 256, "block_size": 4, "threads": 1}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", ["1", "3", "4", "7", "8", "12", "12-wrapper"])
def test_stock_loaders_compute_the_same(
    variant: str, style: Style, compressed: Compressed, exported: Exported
) -> None:
    ours, model = compressed_decoder(compressed(variant)), stock_model(exported(variant, style))
    torch.testing.assert_close(stock_logits(model), logits_of(ours), rtol=0, atol=1e-3)
    quantized = [m for m in model.modules() if hasattr(m, "quantization_scheme")]
    assert bool(quantized) == (style == "pack-quantized")
    # Its first step has written the quantized weights out: to the very same values.
    theirs, mine = model.state_dict(), model_tensors(ours)
    for name, target in tensor_map(ours.config).items():
        stored = name if name == "lm_head.weight" else f"model.{name}"
        assert torch.equal(theirs[stored], target.view(mine)), name


def test_most_checkpoints_are_bfloat16(compressed: Compressed, exported: Exported) -> None:
    """What is written out is rounded to it: experts and embeddings, but no projection."""
    folder = exported("7-bf16", "pack-quantized")
    ours, model = compressed_decoder(compressed("7-bf16")), stock_model(folder)
    rounded = 0
    for name, own in model_tensors(ours).items():
        if name.endswith((".experts.gate_up", ".experts.down", "embedding.weight")):
            rounded += not torch.equal(own, own.bfloat16().float())
            own.data.copy_(own.bfloat16())
    assert rounded
    torch.testing.assert_close(stock_logits(model), logits_of(ours), rtol=0, atol=1e-3)
    assert tensors_of(folder)["model.layers.0.experts.gate_up_proj"].dtype == torch.bfloat16


def test_nothing_is_rounded_if_so_asked(compressed: Compressed, tmp_path: Path) -> None:
    export_checkpoint(compressed("7-bf16"), tmp_path / "made", "pack-quantized", exact=True)
    model, ours = stock_model(tmp_path / "made"), compressed_decoder(compressed("7-bf16"))
    torch.testing.assert_close(stock_logits(model), logits_of(ours), rtol=0, atol=1e-3)
    import_checkpoint(tmp_path / "made", tmp_path / "back")
    assert content(tmp_path / "back") == content(compressed("7-bf16"))


def test_the_config_names_every_layer_once(exported: Exported) -> None:
    folder = exported("7", "pack-quantized")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    targets = [name for group in section["config_groups"].values() for name in group["targets"]]
    schemes = {
        (group["weights"]["num_bits"], group["weights"]["group_size"])
        for group in section["config_groups"].values()
    }
    assert schemes == {(4, 32), (4, 64), (8, 32), (8, 64)}
    assert len(section["config_groups"]) == 4 and len(set(targets)) == len(targets)
    tensors = tensors_of(folder)
    assert {f"{name}.weight_packed" for name in targets} == {n for n in tensors if "_packed" in n}
    plain = {"model.layers.0.router.proj", "model.per_layer_model_projection"}
    assert plain <= set(section["ignore"]) and not set(section["ignore"]) & set(targets)
    assert "model.embed_tokens" not in section["ignore"]
    assert not any(".experts." in name for name in targets)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    limit = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-limit, limit, (7, 960), generator=generator, dtype=torch.int8)
    assert {-limit, limit - 1} <= set(codes.flatten().tolist())
    words = to_words(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(of_words(words, bits), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


@pytest.mark.parametrize("shape", [(5, 48), (3, 2, 20)])
def test_maps_are_those_of_compressed_tensors(shape: tuple[int, ...], tmp_path: Path) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    writer = MapWriter()
    writer.add("model.norm.weight", mask)
    writer.write(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert torch.equal(tensors["model.norm.weight.bitmask"], pack_bitmasks(mask))
    told = tensors["model.norm.weight.shape"].tolist()
    assert told == list(shape)
    assert torch.equal(unpack_bitmasks(tensors["model.norm.weight.bitmask"], told), mask)
    with Maps(tmp_path / FILE, {"norm.weight": shape}) as maps:
        found = maps.mask("norm.weight")
        assert found is not None and torch.equal(found, mask)


def test_every_sparse_weight_has_a_map(exported: Exported) -> None:
    """Experts too, in the row order of their tensors; what it tells to be pruned is zero."""
    for style in STYLES:
        folder = exported("7", style)
        maps, tensors = load_file(folder / FILE), tensors_of(folder)
        names = {name.removesuffix(".bitmask") for name in maps if name.endswith(".bitmask")}
        assert "model.layers.0.experts.gate_up_proj" in names and len(names) > 10
        for name in names:
            mask = unpack_bitmasks(maps[f"{name}.bitmask"], maps[f"{name}.shape"].tolist())
            values = tensors.get(name)
            if values is None:
                words = tensors[f"{name}_packed"]
                values = of_words(words, words.shape[1] * 32 // mask.shape[1])
            assert values.shape == mask.shape and not values[~mask].any()


def test_the_engine_runs_a_dense_one(text_checkpoint: Path, tmp_path: Path) -> None:
    folder = compress_somehow(text_checkpoint, tmp_path / "made")
    export_checkpoint(folder, tmp_path / "dense", "dense")
    asked: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    with Engine(folder, **SMALL) as packed, Engine(tmp_path / "dense", **SMALL) as plain:
        assert packed.generate("Hello", **asked).text == plain.generate("Hello", **asked).text
    export_checkpoint(folder, tmp_path / "packed", "pack-quantized")
    with pytest.raises(CheckpointError, match="conclave import"):
        Engine(tmp_path / "packed", **SMALL)


def test_shards_are_of_bounded_size(compressed: Compressed, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    export_checkpoint(compressed("1"), folder, "pack-quantized", shard_bytes=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 5 and set(shards) == set(index["weight_map"].values())
    assert "sparsity.safetensors" not in index["weight_map"].values()
    tensors = tensors_of(folder)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors.values())
    sizes = [sum(each.nbytes for each in load_file(folder / name).values()) for name in shards]
    largest = max(each.nbytes for each in tensors.values())
    assert all(size <= max(40_000, largest) for size in sizes)
    ours = compressed_decoder(compressed("1"))
    torch.testing.assert_close(
        stock_logits(stock_model(folder)), logits_of(ours), rtol=0, atol=1e-3
    )


def test_the_same_bytes_again(compressed: Compressed, exported: Exported, tmp_path: Path) -> None:
    export_checkpoint(compressed("7"), tmp_path / "again", "pack-quantized")
    for path in exported("7", "pack-quantized").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


class Killed(Exception):
    pass


def test_killed_anywhere(
    compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left has no seal, is no checkpoint that loads, and is not written over."""
    source, left, sync = compressed("11"), [10**9], os.fsync

    def fsync(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    export_checkpoint(source, tmp_path / "whole", "pack-quantized")
    steps = 10**9 - left[0]
    assert check_seal(tmp_path / "whole")
    for step in range(steps - 1):
        folder, left[0] = tmp_path / str(step), step
        with pytest.raises(Killed):
            export_checkpoint(source, folder, "pack-quantized")
        left[0] = 10**9
        assert not (folder / SEAL).exists()
        with pytest.raises(ConfigError, match="is not empty: remove it"):
            export_checkpoint(source, folder, "pack-quantized")


def test_what_is_not_exported(compressed: Compressed, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(compressed("11"), damaged)
    data = bytearray((damaged / "layer-001.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "layer-001.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layer-001\.safetensors is not what was written"):
        export_checkpoint(damaged, tmp_path / "made", "dense")
    (damaged / "conclave.json").unlink()
    with pytest.raises(CheckpointError, match="name a compressed checkpoint"):
        export_checkpoint(damaged, tmp_path / "other", "dense")
