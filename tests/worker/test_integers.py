"""Which linears multiply prompts as integers, and what `prompt_error` says where none does."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from benchmarks.random_model import RandomModel
from conclave.kernels.formats import Format
from conclave.kernels.integer.digits import LEAST_ERROR, fits
from conclave.kernels.linear import gated_linear, linear
from conclave.worker import Engine, EngineConfig
from conclave.worker.config import LEAST_PROMPT_ERROR, LEAST_PROMPT_STEP
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.model import integers, packed
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.packed import PackedGate, PackedLinear

Checkpoint = Callable[[int | str], Path]
CPU = torch.device("cpu")
SMALL = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 256, "head_dim": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1}


def decoder_of(whole: bool = True, format: str = "5:16-int4-g128") -> Decoder:
    """One layer of 31B's kind, small."""
    config = ModelConfig.parse(shape_settings("31b", 1) | SMALL | HEADS)
    return RandomModel(config, Format.parse(format), CPU, whole=whole).decoder()


def linears(decoder: Decoder) -> list[PackedLinear | PackedGate]:
    found = decoder.layers.modules()
    return [module for module in found if isinstance(module, PackedLinear | PackedGate)]


def test_linears_with_whole_scales_may() -> None:
    for decoder in (decoder_of(whole=False), decoder_of(False, "5:16-int8-g64")):
        assert integers.allow_integers(decoder, 0, 0.01) == 0
        assert not any(linear.error for linear in linears(decoder))
    decoder = decoder_of()
    assert integers.allow_integers(decoder, 0, 0.01) == 4
    assert all(linear.error == 0.01 for linear in linears(decoder))


def test_many_tokens_are_multiplied_so_and_few_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of()
    integers.allow_integers(decoder, 0, 0.03)
    monkeypatch.setattr(packed, "MANY", 5)
    for module in linears(decoder):
        x = torch.randn(5, module.weight.columns).bfloat16()
        by = gated_linear if isinstance(module, PackedGate) else linear
        rounded = by(x, module.weight, max_error=0.03)
        assert torch.equal(module(x), rounded)
        exact = by(x, module.weight)
        assert torch.equal(module(x[:4]), exact[:4]) and not torch.equal(exact, rounded)


def test_a_probe_leaves_out_those_that_would_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three blocks of what `down` is given have second digits in one tile of two."""
    decoder = decoder_of()
    integers.allow_integers(decoder, 0, 0.01)
    seen: list[int] = []

    def to_digits(x: Tensor, max_error: float) -> SimpleNamespace:
        assert max_error == 0.01 and len(x) == 32 and fits(x.shape[1])
        seen.append(x.shape[1])
        blocks = x.shape[1] // 128
        counts = torch.tensor([2, 0] if blocks == 3 else [0, 0])
        marks = torch.zeros(3, 1 + 2 * blocks, dtype=torch.int32)
        marks[1:, 0] = counts
        return SimpleNamespace(marks=marks)

    monkeypatch.setattr(integers, "to_digits", to_digits)
    monkeypatch.setattr(integers, "MANY", 32)
    assert integers.keep_the_faster(decoder, CPU) == 3
    assert len(seen) == 4 and seen.count(384) == 1
    given = {linear.weight.columns: linear.error for linear in linears(decoder)}
    assert given[384] is None and set(given.values()) == {0.01, None}
    decoder(torch.zeros(3, dtype=torch.int64), torch.arange(3), SimpleNamespace(attend=attend))
    assert len(seen) == 4, "nobody looks any more"


def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query


@pytest.mark.parametrize("value", [0.001, 0.6, float("nan")])
def test_errors_that_cannot_be_kept_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="prompt_error"):
        EngineConfig(model=tmp_path, prompt_error=value, max_step_tokens=1024)


def test_settings_know_what_kernels_need() -> None:
    """They are checked where there is no torch."""
    assert (LEAST_PROMPT_STEP, LEAST_PROMPT_ERROR) == (packed.MANY, LEAST_ERROR)


def test_steps_must_be_long_enough(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="max_step_tokens is 512: raise that"):
        EngineConfig(model=tmp_path, prompt_error=0.01)


def test_elsewhere_nothing_changes_and_that_is_told(
    tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "max_context": 96,
        "kv_tokens": 512,
        "threads": 1,
        "max_step_tokens": 1024,
    }
    with caplog.at_level(logging.WARNING):
        Engine(tiny_checkpoint("1"), device="cpu", prompt_error=0.01, **options).close()
    assert "prompt_error changes nothing on cpu" in caplog.text
