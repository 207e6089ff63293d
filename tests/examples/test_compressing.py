"""The route from encoded text to a compressed, recovered model, on a tiny one."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from conclave.worker.compress.manifest import MANIFEST, read_manifest
from conclave.worker.compress.quality.report import stored_weights
from conclave.worker.compress.recovery.schedule import Schedule
from conclave.worker.model.config import ModelConfig
from conclave.worker.weights import tensor_map
from examples.debian_model.architecture import CONFIG
from examples.debian_model.compressing import (
    ROW_LENGTH,
    Splits,
    compress_in_one_shot,
    packed_rows,
    recover,
)
from examples.debian_model.encoding import Encoded
from examples.debian_model.files import RouteError

TINY = CONFIG | {
    "global_head_dim": 64,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
}
CPU = torch.device("cpu")


def encoded(documents: int) -> Encoded:
    """Documents of rising length, each of one token over and over."""
    lengths = numpy.arange(documents) * 7 + 20
    tokens = numpy.repeat(numpy.arange(documents) % 128, lengths)
    empty = numpy.zeros(documents, numpy.int32)
    return Encoded(
        tokens=tokens.astype(numpy.uint16),
        ends=lengths.cumsum(),
        prompts=empty,
        sizes=empty,
        languages=empty.astype(numpy.uint8),
        plain=empty == 0,
    )


def test_rows_have_whole_documents_in_another_order() -> None:
    text = encoded(60)
    rows = packed_rows(text, seed=1)
    assert rows.shape == (len(text.tokens) // ROW_LENGTH, ROW_LENGTH)
    borders = rows.flatten().diff().ne(0).sum()
    assert 40 < borders < 60, "documents stay in one piece"
    assert not torch.equal(rows, packed_rows(text, seed=2))
    assert torch.equal(rows, packed_rows(text, seed=1))


def test_compressed_and_recovered(tmp_path: Path) -> None:
    original, pruned, target = (tmp_path / name for name in ("original", "pruned", "target"))
    original.mkdir()
    (original / "config.json").write_text(json.dumps(TINY))
    shapes = tensor_map(ModelConfig.load(original))
    torch.manual_seed(0)
    weights = {name: torch.randn(own.shape) * 0.3 for name, own in shapes.items()}
    save_file(weights, original / "model.safetensors")
    splits = Splits.of(encoded(60), encoded(30))
    compress_in_one_shot(original, pruned, splits.training[:4], CPU)
    said: list[object] = []
    more = splits.taught_by([original], 2, 3, CPU)
    assert torch.equal(more.training[:2], splits.training[:2]) and len(more.training) == 5
    assert more.validation is splits.validation and more.written == 3
    kept = tmp_path / "written.npy"
    first = splits.taught_by([original], 2, 3, CPU, kept)
    again = splits.taught_by([tmp_path / "nobody"], 2, 2, CPU, kept)
    assert torch.equal(first.training, more.training)
    assert torch.equal(again.training, more.training[:4])
    with pytest.raises(RouteError, match="name another file"):
        splits.taught_by([original], 2, 4, CPU, kept)
    schedule = Schedule(steps=2, sequences=2, at_once=2, looks=2)
    looks = recover(pruned, original, target, more, schedule, CPU, said.append)
    assert said == looks and len(looks) == 2
    records = read_manifest(target / MANIFEST).weights
    formats = {name: own.format for name, own in records.items()}
    assert formats["embedding.weight"] == "dense-int8-g64"
    assert {own for name, own in formats.items() if "layers" in name} == {"5:16-int4-g64"}
    averaged = tmp_path / "averaged"
    compress_in_one_shot(original, averaged, splits.training[:4], CPU, sparsity=0.6875)
    stored = [own for own in stored_weights(averaged) if own.layer is not None]
    gone = sum(own.weights * own.sparsity for own in stored)
    assert gone >= 0.6875 * sum(own.weights for own in stored)
    assert len({own.sparsity for own in stored}) > 1
