"""An engine on the GPU keeps to its memory budget, and its knobs make its weights small."""

from pathlib import Path

import pytest
import torch

from conclave.worker import Engine, EngineConfig, Knobs
from conclave.worker.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODEL = Path(__file__).parents[2] / "examples" / "models" / "debian-8m-dense"


def test_weights_cache_and_steps_stay_within_it() -> None:
    knobs = Knobs(weight_bits=8, memory_budget=0.25)
    config = EngineConfig(
        model=MODEL, device="cuda", knobs=knobs, max_sequences=32, max_step_tokens=256
    )
    before = torch.cuda.memory_allocated()
    with Engine(config) as engine:
        found = engine.model.storage.precision
        assert (found.sparsity, found.weight_bits) == (0, 8) and 8 < found.bits_per_weight < 10
        loaded = torch.cuda.memory_allocated() - before
        stored = engine.model.storage.bytes + engine.model.cache.bytes
        assert 0.98 * stored < loaded < 1.05 * stored
        torch.cuda.reset_peak_memory_stats()
        context = engine.model.cache.max_context
        engine.score([5] * (context // 2), [[6] * (context // 2 - 1)])
        streams = [
            engine.stream([number] * 200, max_tokens=64, ignore_eos=True) for number in range(5, 37)
        ]
        assert all(len(stream.result().token_ids) == 64 for stream in streams)
        assert torch.cuda.max_memory_allocated() - before < 0.25 * 2**30


def test_a_budget_that_nobody_has_is_refused() -> None:
    held = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    with pytest.raises(ConfigError, match=r"cuda has .* free; lower it"):
        Engine(MODEL, device="cuda", knobs=Knobs(memory_budget="100%"))
    del held
