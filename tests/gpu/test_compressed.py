"""Compressed checkpoints on the GPU: weights stay packed, and mean what they mean on a CPU."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.kernels.formats import Format
from conclave.kernels.layouts import PackedWeight, pack
from conclave.worker.compress.checkpoint import CheckpointWriter
from conclave.worker.compress.contents import Contents
from conclave.worker.compress.reader import load_compressed
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.packed import packed_order
from conclave.worker.weights import load_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def tiny_checkpoints() -> Any:
    """tests/worker/conftest.py, which pytest shares with its own folder only."""
    path = Path(__file__).parents[1] / "worker" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_checkpoints", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compressed(source: Path, folder: Path, format: Format) -> Path:
    """`source` with every weight in `format` that can be."""
    decoder = load_decoder(source, ModelConfig.load(source), torch.device("cpu"), torch.float32)
    contents = Contents(decoder.config)
    state = decoder.state_dict()
    weights: dict[str, torch.Tensor | PackedWeight] = dict(state)
    for name in contents.packable_names:
        weights[name] = pack(packed_order(name, state[name]), format)
    writer = CheckpointWriter(folder, source)
    *layers, rest = contents.files.values()
    for index, layer in enumerate(layers):
        writer.write_layer(index, {name: weights[name] for name in layer})
    writer.write_rest({name: weights[name] for name in rest})
    writer.finish({})
    return folder


def logits_of(decoder: Decoder, device: torch.device, length: int) -> torch.Tensor:
    prompt = torch.arange(5, 5 + length, device=device)
    with torch.inference_mode():
        attention = DenseAttention(decoder.config, [length])
        return decoder.logits(decoder(prompt, torch.arange(length, device=device), attention)).cpu()


@pytest.mark.parametrize("length", [1, 21])
@pytest.mark.parametrize(
    ("variant", "text"), [("1", "5:16-int4-g32"), ("1", "dense-int8-g32"), ("7", "8:16-bf16")]
)
def test_packed_there_and_unpacked_here(
    variant: str, text: str, length: int, tmp_path: Path
) -> None:
    source = tiny_checkpoints().write_checkpoint(variant, tmp_path / "source")
    folder = compressed(source, tmp_path / "made", Format.parse(text))
    config, here, there = ModelConfig.load(folder), torch.device("cpu"), torch.device("cuda")
    unpacked = load_compressed(folder, config, here, torch.float32)
    packed = load_compressed(folder, config, there, torch.bfloat16)
    assert not Contents(config).packable_names & dict(packed.named_parameters()).keys()
    assert {parameter.device.type for parameter in packed.parameters()} == {"cuda"}
    truth = logits_of(unpacked, here, length)
    assert (logits_of(packed, there, length) - truth).norm() < 0.05 * truth.norm()
