"""One compressed checkpoint as the pattern of another."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conclave.kernels.formats import Format, PackedWeight
from conclave.kernels.layouts import mask_of, unpack
from conclave.worker.compress.layerwise import compress_checkpoint
from conclave.worker.compress.manifest import MANIFEST, read_manifest
from conclave.worker.compress.pruning import MODES, Mode, compress, output_error, strongest
from conclave.worker.compress.reader import read_list, read_weights
from conclave.worker.compress.recipe import Recipe
from conclave.worker.compress.sources.like import Like
from conclave.worker.errors import CheckpointError
from conclave.worker.model.config import ModelConfig

Checkpoint = Callable[[int | str], Path]
CPU = torch.device("cpu")
RECIPE = Recipe(
    Format.parse("5:16-bf16"),
    "sparsegpt",
    {
        "layers.0.*": None,
        "*.out.weight": Format.parse("dense-int8-g32"),
        "layers.1.*.qkv.weight": Format.parse("8:16-int8-g32"),
        "layers.2.*.qkv.weight": Format.parse("8:16-int4-g32"),
    },
)


def tokens(count: int = 6) -> Tensor:
    return torch.randint(3, 290, (count, 24), generator=torch.Generator().manual_seed(3))


def tuned(source: Path, folder: Path) -> Path:
    """The model after some more training."""
    shutil.copytree(source, folder)
    torch.manual_seed(4)
    weights = load_file(folder / "model.safetensors")
    moved = {
        name: own * (1 + 0.2 * torch.randn(own.shape)) if own.dim() > 1 else own
        for name, own in weights.items()
    }
    save_file(moved, folder / "model.safetensors")
    return folder


def packed_weights(folder: Path) -> dict[str, PackedWeight]:
    manifest, contents = read_list(folder, ModelConfig.load(folder))
    found: dict[str, PackedWeight] = {}
    for file in contents.files:
        record = manifest.files[file]
        read = read_weights(folder / file, record, contents, manifest.weights, CPU)
        found |= {name: own for name, own in read.items() if isinstance(own, PackedWeight)}
    return found


@pytest.mark.parametrize(
    ("variant", "mode"), [("1", "sparsegpt"), ("7", "wanda"), ("1", "magnitude")]
)
def test_the_same_survivors(
    variant: str, mode: Mode, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, other = tiny_checkpoint(variant), tmp_path / "other"
    recipe = RECIPE if variant == "1" else Recipe(Format.parse("5:16-bf16"), "sparsegpt")
    compress_checkpoint(source, other, recipe, tokens(), CPU, {})
    further = tuned(source, tmp_path / "tuned")
    like = Like(other, ModelConfig.load(further))
    made = tmp_path / "made"
    compress_checkpoint(further, made, like.recipe(mode), tokens(), CPU, {}, like=like)
    theirs, ours = packed_weights(other), packed_weights(made)
    assert ours.keys() == theirs.keys()
    for name, own in ours.items():
        assert own.format == theirs[name].format
        assert torch.equal(mask_of(own), mask_of(theirs[name])), name
        if own.positions is not None:
            assert torch.equal(own.positions, theirs[name].tensors()["positions"]), name
        assert not torch.equal(unpack(own), unpack(theirs[name]))
    about = read_manifest(made / MANIFEST).about
    assert about["like"] == like.fingerprint


def test_gone_on_with(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The same bytes as at once."""
    source, other = tiny_checkpoint("1"), tmp_path / "other"
    compress_checkpoint(source, other, RECIPE, tokens(), CPU, {})
    like = Like(other, ModelConfig.load(source))

    def kill(done: int, layers: int) -> None:
        if done == 3:
            raise InterruptedError

    again, cut = tmp_path / "again", tmp_path / "cut"
    recipe = like.recipe("sparsegpt")
    with pytest.raises(InterruptedError):
        compress_checkpoint(source, cut, recipe, tokens(), CPU, {}, kill, like=like)
    for folder in (again, cut):
        compress_checkpoint(source, folder, recipe, tokens(), CPU, {}, like=like)
    for path in cut.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_what_is_no_pattern(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = ModelConfig.load(tiny_checkpoint("1"))
    with pytest.raises(CheckpointError, match="name a compressed checkpoint"):
        Like(tiny_checkpoint("1"), config)
    other = tmp_path / "other"
    compress_checkpoint(tiny_checkpoint("4"), other, Recipe(None, "wanda"), tokens(), CPU, {})
    with pytest.raises(CheckpointError, match=r"layers\.0.* in .*other, but .* in the source"):
        Like(other, config)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", ["5:16-int4-g64", "4:16-bf16", "8:16-int8-g64"])
def test_a_given_map_is_kept(text: str, mode: Mode) -> None:
    """And compensation still makes up for what goes."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(512, 32, generator=draw) @ torch.randn(32, 128, generator=draw)
    inputs += 0.3 * torch.randn(512, 128, generator=draw)
    weight, moments = torch.randn(40, 128, generator=draw), inputs.T @ inputs
    format = Format.parse(text)
    mask = strongest(torch.rand(40, 128, generator=draw), format.kept)
    kept = mask.clone()
    found = compress(weight, moments, format, mode, mask)
    assert torch.equal(mask_of(found), kept) and torch.equal(mask, kept)
    error = output_error(weight, unpack(found), moments)
    rounded = output_error(weight, weight * mask, moments)
    assert error < 0.85 * rounded if mode == "sparsegpt" else error > 0.9 * rounded
