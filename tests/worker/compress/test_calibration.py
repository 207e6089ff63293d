"""Calibration text, and what layers tell about their inputs."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conclave.worker.compress.calibration import (
    Moments,
    Shares,
    Text,
    check_ids,
    read_texts,
    sequences,
)
from conclave.worker.errors import ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.layers import DecoderLayer
from conclave.worker.text.tokenizer import Tokenizer
from conclave.worker.weights import load_decoder

Checkpoint = Callable[[int | str], Path]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_languages_take_turns(tmp_path: Path, text_checkpoint: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"a{i:03}", "language": "a"} for i in range(90)]
    rows += [{"text": f"b{i:03}", "language": "b"} for i in range(10)]
    path = write_jsonl(tmp_path / "text.jsonl", rows)
    tokenizer = Tokenizer(text_checkpoint)
    each = len(tokenizer.encode("a000"))
    found = sequences(path, tokenizer, 10, 2 * each, seed=1)
    assert found.shape == (10, 2 * each) and found.dtype == torch.int64
    assert torch.equal(found, sequences(path, tokenizer, 10, 2 * each, seed=1))
    assert not torch.equal(found, sequences(path, tokenizer, 10, 2 * each, seed=2))
    texts = [tokenizer.encode(f"{letter}000") for letter in "ab"]
    place = next(i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b)
    letters = Counter(found.flatten()[place::each].tolist())
    assert set(letters.values()) == {10}


def test_plain_text_is_cut_at_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\nmore\n\ntwo\n\n\n")
    assert read_texts(path) == [Text("one\nmore"), Text("two")]


def test_all_but_a_text_may_be_missing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "x", "language": None}, {"text": ""}])
    assert read_texts(path) == [Text("x"), Text("")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": 1'),
        ("a.jsonl", b'{"words": "x"}'),
        ("a.jsonl", b"[1]"),
        ("a.jsonl", b'{"text": null}'),
        ("a.jsonl", b'{"text": "x", "language": 3}'),
        ("a.txt", b"\xff\xfe\xfa"),
        ("a.txt", b"\n\n"),
    ],
)
def test_unreadable_text_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_texts(tmp_path / name)
    (tmp_path / "long.txt").write_bytes(b"\xff" * 4000)
    with pytest.raises(ConfigError) as refused:
        read_texts(tmp_path / "long.txt")
    assert len(str(refused.value)) < 400  # it does not tell all that it read
    with pytest.raises(ConfigError, match="nowhere"):
        read_texts(tmp_path / "nowhere.txt")


def test_too_little_text_is_refused(tmp_path: Path, text_checkpoint: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "few words"}])
    with pytest.raises(ConfigError, match="fewer or shorter"):
        sequences(path, Tokenizer(text_checkpoint), 100, 100, 0)


def test_ids_that_a_model_lacks(tiny_checkpoint: Checkpoint) -> None:
    """Also where only the per-layer table is short, of the second of two models."""
    whole, short = tiny_checkpoint("5"), tiny_checkpoint("5-small-table")
    known = ModelConfig.load(short).vocabulary
    tokens = torch.tensor([[3, known - 1], [4, 5]])
    check_ids(tokens, whole, short)
    tokens[1, 0] = known
    check_ids(tokens, whole)
    with pytest.raises(ConfigError, match=f"token id {known}, but .* below {known}"):
        check_ids(tokens, whole, short)


def decoder_of(folder: Path) -> Decoder:
    return load_decoder(folder, ModelConfig.load(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("variant", ["1", "6"])
def test_moments_are_those_of_the_inputs(variant: str, tiny_checkpoint: Checkpoint) -> None:
    """Of the first layer, whose inputs are known; of experts, by their own products."""
    decoder = decoder_of(tiny_checkpoint(variant))
    layer = decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    hidden = torch.randn(21, 64)
    attention = DenseAttention(decoder.config, [21])
    rotation = decoder.rotations(torch.arange(21))[0]
    with torch.inference_mode():
        plain = layer(hidden, rotation, None, attention)
        with Moments(layer) as moments:
            watched = layer(hidden, rotation, None, DenseAttention(decoder.config, [21]))
        assert torch.equal(plain, watched)
        normed = layer.attention_norm(hidden)
    torch.testing.assert_close(moments.sums["attention.qkv.weight"], normed.T @ normed)
    assert int(moments.counts["feed_forward.mlp.down.weight"]) == 21
    before = {name: total.clone() for name, total in moments.sums.items()}
    with torch.inference_mode():
        layer(hidden, rotation, None, DenseAttention(decoder.config, [21]))
    assert all(torch.equal(total, before[name]) for name, total in moments.sums.items())
    if variant == "6":
        counts = moments.counts["feed_forward.experts.gate_up"]
        assert int(counts.sum()) == 21 * 2
        assert torch.equal(counts, moments.counts["feed_forward.experts.down"])
        sums = moments.sums["feed_forward.experts.gate_up"]
        assert bool((sums.diagonal(dim1=1, dim2=2).sum(1) > 0).eq(counts > 0).all())


def test_shares_of_the_branches(tiny_checkpoint: Checkpoint) -> None:
    decoder = decoder_of(tiny_checkpoint("1"))
    layer = decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    hidden, rotation = torch.randn(21, 64), decoder.rotations(torch.arange(21))[0]
    with torch.inference_mode(), Shares(layer) as shares:
        layer(hidden, rotation, None, DenseAttention(decoder.config, [21]))
    attention, mlp = shares.of("attention.qkv.weight"), shares.of("feed_forward.mlp.down.weight")
    assert attention == shares.of("attention.out.weight") > 0 and mlp > 0
    layer.attention_output_norm.weight.data *= 2
    with torch.inference_mode(), Shares(layer) as louder:
        layer(hidden, rotation, None, DenseAttention(decoder.config, [21]))
    assert louder.of("attention.out.weight") > attention
