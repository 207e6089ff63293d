"""Engines that multiply prompts as integers, on a Hopper card."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.kernels.launching.launch import launches
from conclave.worker import Engine, EngineConfig
from conclave.worker.loading import load_model
from conclave.worker.model.decoder import DenseAttention
from conclave.worker.model.packed import MANY, PackedGate, PackedLinear

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs Hopper")]
MODEL = Path(__file__).parents[2] / "examples/models/debian-8m-dense"
SETTINGS: dict[str, Any] = {
    **{"model": MODEL, "weight_format": "dense-int4-g64", "max_step_tokens": MANY},
    **{"max_context": 2 * MANY, "kv_tokens": 4 * MANY, "prompt_error": 0.03},
}


def products() -> int:
    return sum(count for (name, _), count in launches().items() if name == "integer_product")


def test_hidden_states_are_near_those_of_exact_products() -> None:
    loaded = load_model(EngineConfig(**SETTINGS))
    decoder, device = loaded.runner.decoder, loaded.device
    linears = [own for own in decoder.modules() if isinstance(own, PackedLinear | PackedGate)]
    willing = [own for own in linears if own.error is not None]
    assert {own.weight.columns for own in willing} == {256, 512}  # 960 is no multiple of 128
    tokens = torch.arange(MANY, device=device) % 4000 + 10
    before = products()

    def run() -> torch.Tensor:
        with torch.inference_mode():
            attention = DenseAttention(decoder.config, [MANY])
            hidden: torch.Tensor = decoder(tokens, torch.arange(MANY, device=device), attention)
        return hidden.double()

    found = run()
    assert products() == before + len(willing)
    for own in willing:
        own.error = None
    exact = run()
    assert products() == before + len(willing)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.1


def test_an_engine_answers_alike_whatever_came_before() -> None:
    prompt = [10 + number % 4000 for number in range(MANY + 100)]
    with Engine(EngineConfig(**SETTINGS, prefix_cache=False)) as engine:
        before = products()
        first = engine.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True)
        assert products() > before
        engine.generate("Another one", max_tokens=4, temperature=0)
        again = engine.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True)
    assert first.token_ids == again.token_ids
