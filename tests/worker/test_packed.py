"""Decoders whose weights are stored in a compressed format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.kernels.formats import Format
from conclave.kernels.layouts import pack
from conclave.worker import Engine
from conclave.worker.errors import ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.packed import (
    large_modules,
    pack_decoder,
    packable,
    packed_order,
    put_packed,
    round_decoder,
)
from conclave.worker.model.storage import aligned, storage_of
from conclave.worker.weights import load_decoder

SMALL: dict[str, Any] = {"max_context": 96, "kv_tokens": 4096, "block_size": 4, "threads": 1}
PROMPT = [5, 17, 333, 42, 8, 99, 250]
Checkpoint = Callable[[int | str], Path]


def logits_of(decoder: Decoder) -> torch.Tensor:
    attention = DenseAttention(decoder.config, [len(PROMPT)])
    with torch.inference_mode():
        hidden = decoder(torch.tensor(PROMPT), torch.arange(len(PROMPT)), attention)
        return decoder.logits(hidden)


def decoder_of(folder: Path) -> Decoder:
    return load_decoder(folder, ModelConfig.load(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("variant", "text"),
    [("1", "dense-int8-g32"), ("4", "dense-int8-g32"), ("7", "5:16-bf16"), ("3", "5:16-bf16")],
)
def test_packed_is_what_it_is_rounded_to(
    variant: str, text: str, tiny_checkpoint: Checkpoint
) -> None:
    """The interleaved rows of gate and up, sorted experts and all, against plain products."""
    folder, format = tiny_checkpoint(variant), Format.parse(text)
    plain, packed, rounded = (decoder_of(folder) for _ in range(3))
    pack_decoder(packed, format)
    round_decoder(rounded, format)
    assert not any(name.endswith("gate_up") for name, _ in packed.named_parameters())
    expected, got = logits_of(rounded), logits_of(packed)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    off = (expected - logits_of(plain)).norm() / expected.norm()
    assert 1e-4 < off < (0.1 if text.startswith("dense") else 2.0)


@pytest.mark.parametrize(
    ("variant", "text", "share"),
    [
        ("1", "dense-int4-g32", 0),
        ("1", "dense-int4-g32", 1),
        ("4", "5:16-int4-g32", 1),
        ("5", "5:16-int4-g32", 2),  # every second module, so that layers are mixed
        ("6", "8:16-int8-g32", 0),
        ("6-wide", "8:16-int8-g32", 1),
        ("6-wide", "8:16-int8-g32", 2),
    ],
)
def test_modules_take_what_is_told_before(
    variant: str, text: str, share: int, tiny_checkpoint: Checkpoint
) -> None:
    decoder, format = decoder_of(tiny_checkpoint(variant)), Format.parse(text)
    chosen = [*packable(decoder).items()][::share] if share else []
    formats = {name: format for _, names in chosen for name in names}
    told = storage_of(decoder, formats, torch.float32, packed=True)
    for module, names in chosen:
        plain = [packed_order(name, decoder.get_parameter(name).detach()) for name in names]
        put_packed(decoder, module, [pack(each, format) for each in plain], torch.float32)
    for layer, stored in zip(decoder.layers, told.layers, strict=True):
        sizes = [
            sum(aligned(tensor.nbytes) for *_, tensor in fields)
            for _, fields in large_modules(layer)
        ]
        assert sorted(sizes) == sorted(stored.modules) and sum(sizes) == stored.block
        assert len(sizes) == (5 if stored.experts else 4) and max(sizes) <= told.largest_module
    assert told.largest_module == max(max(layer.modules) for layer in told.layers)


def test_the_engine_packs_on_loading(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    with (
        Engine(folder, **SMALL) as plain,
        Engine(folder, **SMALL, weight_format="5:16-bf16") as sparse,
    ):
        assert plain.model.fingerprint != sparse.model.fingerprint
        assert plain.model.parameters == sparse.model.parameters


@pytest.mark.parametrize(
    ("variant", "text", "message"),
    [
        ("1", "int3", "weight_format: 'int3' is no format; write"),
        ("1", "dense-int4-g128", "attention.qkv.weight cannot be stored as dense-int4-g128: 64"),
        ("6", "dense-int8-g32", "experts.down cannot be stored as dense-int8-g32: 24 columns"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(
    variant: str, text: str, message: str, tiny_checkpoint: Checkpoint
) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_checkpoint(variant), **SMALL, weight_format=text)
