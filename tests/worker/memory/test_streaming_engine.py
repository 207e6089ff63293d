"""Engines whose weights do not fit their budget: the same answers, told how they came about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conclave.worker import Engine, Knobs
from conclave.worker.memory.device import library_memory
from conclave.worker.model.config import cache_groups
from conclave.worker.narrow import expected_token_bytes
from conclave.worker.scheduling.sizing import cache_bytes
from conclave.worker.scheduling.workspace import workspace
from conclave.worker.serving.wire import load

Checkpoint = Callable[[int | str], Path]
FEW: dict[str, Any] = {
    **{"max_context": 96, "block_size": 4, "threads": 1},
    **{"max_sequences": 4, "max_step_tokens": 32},
}
PROMPTS = [list(range(20, 60)), [7, 8, 9], [300, 2, 300, 2, 300]]


def answers(engine: Engine) -> list[tuple[int, ...]]:
    streams = [
        engine.stream(prompt, max_tokens=12, temperature=0, ignore_eos=True) for prompt in PROMPTS
    ]
    return [tuple(stream.result().token_ids) for stream in streams]


def beside_layers(engine: Engine) -> int:
    """Bytes of all but the layers' large weights, with the smallest cache; experts foreseen."""
    config, model, storage = engine.config, engine.model.config, engine.model.storage
    size, context = engine.model.dtype.itemsize, engine.model.cache.max_context
    step = workspace(config, model, context, size, storage.expanded)
    return storage.rest + step + 2 * library_memory(engine.model.device) + cache_of_one(engine)


def cache_of_one(engine: Engine) -> int:
    """Bytes of the smallest cache."""
    config, model, context = engine.config, engine.model.config, engine.model.cache.max_context
    size = engine.model.dtype.itemsize
    bytes_each = expected_token_bytes(model, config.knobs.max_error, size)
    return cache_bytes(config, cache_groups(model), context, bytes_each)[0]


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("1", {}), ("3", {"sparsity": 0.6}), ("6", {}), ("1", {"max_error": 0.05})],
)
def test_answers_are_those_of_a_model_that_fits(
    variant: str, settings: dict[str, Any], tiny_checkpoint: Checkpoint
) -> None:
    folder = tiny_checkpoint(variant)
    with Engine(folder, knobs=Knobs(memory_budget=1, **settings), **FEW) as resident:
        assert resident.load.stream is None
        wanted = answers(resident)
        fixed = beside_layers(resident)
        layers = sum(layer.block for layer in resident.model.storage.layers)
    for prefetch, share in ((None, 0.9), (False, 0.5), (1, 0.5)):
        budget = fixed + share * layers
        knobs = Knobs(memory_budget=budget / 2**30, prefetch=prefetch, **settings)
        with Engine(folder, knobs=knobs, stream_experts=False, **FEW) as engine:
            assert answers(engine) == wanted
            use = engine.load.stream
            assert use is not None and use.layers > use.slots > 0
            steps = engine.load.steps
            primed = use.copied_bytes - steps * use.host_bytes
            assert 0 <= primed < use.host_bytes and use.stalled_seconds >= 0
            message = load(engine.load, 0.0, False).streaming
            assert (message.layers, message.copied_bytes) == (use.layers, use.copied_bytes)
    assert not load(resident.load, 0.0, False).HasField("streaming")
