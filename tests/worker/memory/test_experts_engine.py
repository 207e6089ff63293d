"""Engines whose experts do not fit their budget: the same answers, told how they came about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine, Knobs
from conclave.worker.errors import ConfigError
from conclave.worker.memory.experts import cache
from conclave.worker.memory.experts.slots import choose_slots, fewest_slots
from conclave.worker.serving.wire import load

from .test_streaming_engine import FEW, PROMPTS, answers, beside_layers, cache_of_one

Checkpoint = Callable[[int | str], Path]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is NaN before another expert comes."""
    made = cache.ExpertCache.__init__

    def poisoning(self: cache.ExpertCache, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "poison": True})

    monkeypatch.setattr(cache.ExpertCache, "__init__", poisoning)


def budget_of(resident: Engine, slots: int) -> float:
    """GiB with room for so many slots; the cache gets its share before more than the fewest."""
    layers = resident.model.storage.layers
    least = fewest_slots(layers)
    assert least is not None
    beside = sum(layer.block - layer.expert_block for layer in layers)
    weights = beside + slots * least.expert_bytes
    share = max(0, weights // 3 - cache_of_one(resident)) if slots > least.slots else 0
    return (beside_layers(resident) + weights + share + 64) / 2**30


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("6", {}),
        ("7", {}),
        ("6-wide", {"weight_format": "5:16-int4-g32"}),
        ("6-wide", {"weight_format": "dense-int4-g32"}),
        ("6", {"prefix_cache": False}),
    ],
)
def test_answers_are_those_of_a_model_that_fits(
    variant: str, settings: dict[str, Any], tiny_checkpoint: Checkpoint
) -> None:
    folder = tiny_checkpoint(variant)
    with Engine(folder, knobs=Knobs(memory_budget=1), **FEW, **settings) as resident:
        assert resident.load.experts is None
        wanted = answers(resident)
        count = resident.model.storage.layers[0].experts
    more = 3 * count // 2
    for slots, prefetch in ((count, None), (more, False), (more, None)):
        knobs = Knobs(memory_budget=budget_of(resident, slots), prefetch=prefetch)
        with Engine(folder, knobs=knobs, **FEW, **settings) as engine:
            assert [answers(engine) for _ in range(2)] == [wanted] * 2
            assert engine.load.stream is None
            experts = engine.model.runner.experts
            assert experts is not None
            use = experts.use()
            assert use.slots == experts.slots.slots >= slots
            assert use.misses > 0 and (prefetch is None or use.foreseen == 0)
            message = load(engine.load, 0.0, False).experts
            assert (message.layers, message.slots) == (use.layers, use.slots)
    assert not load(resident.load, 0.0, False).HasField("experts")


def test_preempted_sequences_answer_the_same(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("6")
    few = {**FEW, "max_context": 64}
    with Engine(folder, knobs=Knobs(memory_budget=1), **few) as resident:
        wanted = answers(resident)
        budget = budget_of(resident, 8)
    with Engine(folder, knobs=Knobs(memory_budget=budget), **few) as engine:
        for _ in range(3):
            assert answers(engine) == wanted
        assert engine.load.preemptions > 0 and engine.model.runner.experts is not None


def test_a_step_that_fails_takes_its_requests_alone(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("6")
    with Engine(folder, knobs=Knobs(memory_budget=1), **FEW) as resident:
        wanted = answers(resident)
        budget = budget_of(resident, 10)
    with Engine(folder, knobs=Knobs(memory_budget=budget), **FEW) as engine:
        for place in ("0.feed_forward.experts.router", "3.feed_forward.mlp", "5.attention"):
            module = engine.model.runner.decoder.get_submodule(f"layers.{place}")
            handle = module.register_forward_hook(fail)
            with pytest.raises(Exception, match="the model failed"):
                engine.generate(PROMPTS[0], max_tokens=2)
            handle.remove()
            assert answers(engine) == wanted


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")


def test_a_budget_too_small_for_slots_streams_layers(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("6")
    with Engine(folder, knobs=Knobs(memory_budget=1), **FEW) as resident:
        wanted, layers = answers(resident), resident.model.storage.layers
        beside = sum(layer.block - layer.expert_block for layer in layers)
        assert choose_slots(layers, beside) is None
        budget = (beside_layers(resident) + 0.55 * sum(each.block for each in layers)) / 2**30
    for by_experts in (True, False):
        knobs, how = Knobs(memory_budget=budget), {"stream_experts": by_experts}
        with Engine(folder, knobs=knobs, **{**FEW, **how}) as engine:
            assert answers(engine) == wanted
            assert (engine.load.stream is None) == (engine.load.experts is not None)
            assert by_experts or engine.load.stream is not None
    with pytest.raises(ConfigError, match="the least for this model"):
        Engine(folder, knobs=Knobs(memory_budget=0.0001), **FEW)


def test_fetches_add_up(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("6")
    with Engine(folder, knobs=Knobs(memory_budget=1), **FEW) as resident:
        budget = budget_of(resident, 16)
    with Engine(folder, knobs=Knobs(memory_budget=budget), **FEW) as engine:
        answers(engine)
        experts = engine.model.runner.experts
        assert experts is not None
        use, table = experts.use(), experts.table
        size = use.host_bytes // (use.layers * use.experts)
        fetched = use.misses + use.foreseen
        assert use.fetched_bytes <= fetched * size and use.stalled_seconds > 0
        assert int(table.clock) == engine.load.steps * use.layers
        held = table.owner[table.owner >= 0]
        assert len(held.unique()) == len(held) == int((table.slot_of >= 0).sum())
        assert torch.equal(table.slot_of[held.long()], torch.arange(len(table.owner))[: len(held)])
