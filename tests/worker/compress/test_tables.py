"""Embeddings and heads in a compressed format: rounded once, and the same to every reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.kernels.formats import Format
from conclave.worker import Engine
from conclave.worker.compress.layerwise import compress_checkpoint
from conclave.worker.compress.manifest import MANIFEST
from conclave.worker.compress.quality.report import stored_weights, totals
from conclave.worker.compress.reader import load_compressed
from conclave.worker.compress.recipe import Recipe
from conclave.worker.compress.sources.like import Like
from conclave.worker.errors import CheckpointError, ConfigError
from conclave.worker.model.config import ModelConfig, cache_groups
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.packed import PackedEmbedding, PackedLinear
from conclave.worker.running.batch import Chunk
from conclave.worker.running.caches import PlainCaches
from conclave.worker.running.runner import ModelRunner
from conclave.worker.weights import load_decoder

Checkpoint = Callable[[int | str], Path]
CPU = torch.device("cpu")
INT8 = Format.parse("dense-int8-g64")
RECIPE = Recipe(Format.parse("8:16-bf16"), "magnitude", embeddings=INT8)
PROMPT = [5, 17, 333, 42, 8, 99, 250]


def made(source: Path, folder: Path, recipe: Recipe = RECIPE, **more: Any) -> dict[str, str]:
    """Compress, and tell the formats of what is in no layer."""
    tokens = torch.randint(3, 290, (2, 16), generator=torch.Generator().manual_seed(3))
    outcomes = compress_checkpoint(source, folder, recipe, tokens, CPU, {}, **more)
    return {own.name: own.format for own in outcomes if not own.name.startswith("layers.")}


def loaded(folder: Path, packed: bool | None = None) -> Decoder:
    return load_compressed(folder, ModelConfig.load(folder), CPU, torch.float32, packed=packed)


def logits_of(decoder: Decoder) -> torch.Tensor:
    attention = DenseAttention(decoder.config, [len(PROMPT)])
    with torch.inference_mode():
        hidden = decoder(torch.tensor(PROMPT), torch.arange(len(PROMPT)), attention)
        return decoder.logits(hidden)


@pytest.mark.parametrize(
    ("variant", "formats"),
    [
        ("1", {"embedding.weight": "dense-int8-g64"}),
        ("3", dict.fromkeys(("embedding.weight", "per_layer.embedding.weight"), "dense-int8-g64")),
        ("4", {"embedding.weight": "dense-int8-g64", "per_layer.embedding.weight": "as it was"}),
        ("8", dict.fromkeys(("embedding.weight", "head.weight"), "dense-int8-g64")),
        ("11", {"embedding.weight": "as it was"}),
    ],
)
def test_packed_is_what_it_is_rounded_to(
    variant: str, formats: dict[str, str], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What no group divides stays as it was (56 columns, 80), and the report says so."""
    source, folder = tiny_checkpoint(variant), tmp_path / "made"
    assert made(source, folder) == formats
    packed, plain = loaded(folder, packed=True), loaded(folder)
    torch.testing.assert_close(logits_of(packed), logits_of(plain), rtol=1e-4, atol=1e-4)
    full = load_decoder(source, ModelConfig.load(source), CPU, torch.float32)
    for name, format in formats.items():
        module = packed.get_submodule(name.removesuffix(".weight"))
        ours, theirs = plain.get_parameter(name), full.get_parameter(name)
        if format == "as it was":
            assert torch.equal(ours, theirs)
            continue
        assert isinstance(module, PackedLinear if name == "head.weight" else PackedEmbedding)
        assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 7e-3
    told = json.loads((folder / MANIFEST).read_text())["about"]["weights"]
    assert {own["name"]: own["format"] for own in told[-len(formats) :]} == formats
    assert all(own["error"] < 5e-5 for own in told[-len(formats) :])


def test_the_engine_speaks_as_the_reference(text_checkpoint: Path, tmp_path: Path) -> None:
    made(text_checkpoint, tmp_path / "made")
    decoder = loaded(tmp_path / "made", packed=True)
    ids = [2, 88, 117]
    with torch.inference_mode():
        for _ in range(12):
            attention = DenseAttention(decoder.config, [len(ids)])
            hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), attention)
            ids.append(int(decoder.logits(hidden[-1:]).argmax()))
    small: dict[str, Any] = {"max_context": 96, "kv_tokens": 256, "block_size": 4, "threads": 1}
    with Engine(tmp_path / "made", **small) as engine:
        answer = engine.generate(ids[:3], max_tokens=12, temperature=0.0, ignore_eos=True)
    assert answer.token_ids == ids[3:]


def test_packed_tables_can_be_recorded(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    made(tiny_checkpoint("3"), tmp_path / "made")
    decoder = loaded(tmp_path / "made", packed=True)
    config = decoder.config
    blocks = tuple(8 for _ in cache_groups(config))
    recorded, plain = (
        ModelRunner(
            decoder,
            config,
            PlainCaches.empty(config, blocks, 4, CPU, torch.float32),
            *(4, CPU, torch.float32),
        )
        for _ in "ab"
    )
    assert recorded._recorded is not None
    plain._recorded = None
    for count in (1, 3):
        chunks = [Chunk([7 * row + 5], 0, ([row],) * len(blocks), 1) for row in range(count)]
        assert torch.equal(recorded.forward(chunks), plain.forward(chunks))


def test_other_formats(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Smaller groups where larger ones do not divide the columns; exceptions by name."""
    source = tiny_checkpoint("3")
    int4 = Recipe(None, "wanda", embeddings=Format.parse("dense-int4-g128"))
    both = made(source, tmp_path / "a", int4)
    assert set(both.values()) == {"dense-int4-g64"}
    name = "per_layer.embedding.weight"
    kept = made(source, tmp_path / "b", Recipe(None, "wanda", {name: None}, INT8))
    assert kept == {"embedding.weight": "dense-int8-g64", name: "as it was"}
    wide = Recipe(None, "wanda", {name: Format.parse("dense-int8-g128")})
    with pytest.raises(ConfigError, match=f"{name} cannot be stored as dense-int8-g128: 64"):
        made(source, tmp_path / "c", wide)
    assert made(source, tmp_path / "d", Recipe(None, "wanda")) == {}
    assert loaded(tmp_path / "d").embedding.weight.shape == (512, 64)


def test_a_pattern_has_them_too(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Even pruned ones keep their map."""
    source = tiny_checkpoint("3")
    odd = Recipe(None, "wanda", {"embedding.weight": Format.parse("8:16-int4-g32")}, INT8)
    made(source, tmp_path / "a", odd)
    like = Like(tmp_path / "a", ModelConfig.load(source))
    assert like.maps("rest.safetensors").keys() == {"embedding.weight"}
    made(source, tmp_path / "b", like.recipe("magnitude"), like=like)
    name = "rest.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_they_count(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    made(tiny_checkpoint("3"), tmp_path / "made")
    stored = {own.name: own for own in stored_weights(tmp_path / "made")}
    own = stored["embedding.weight"]
    assert (own.weights, own.bytes, own.layer) == (512 * 64, 512 * 66, None)
    sums = totals(list(stored.values()))
    assert sums["packed_bytes"] == sum(each.bytes for each in stored.values())
    assert sums["sparsity"] == 0.5


def test_a_table_that_lies_about_itself(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    made(tiny_checkpoint("1"), tmp_path)
    values = json.loads((tmp_path / MANIFEST).read_text())
    values["weights"]["embedding.weight"]["format"] = "dense-int8-g32"
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"embedding\.weight\.scales is BF16"):
        loaded(tmp_path)
