"""Engines whose layers are kept coded: the same answers; plain layers where codes have no room.

In bfloat16 answers depend on how many run together, so that requests come one after the other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from conclave.kernels.errors import CodeError
from conclave.kernels.lossless.codes import Code, encode
from conclave.worker import Engine, Knobs
from conclave.worker.errors import ConfigError
from conclave.worker.memory.residency import least_of_either
from conclave.worker.memory.streaming import coded, copies
from conclave.worker.memory.timeline import chrome_trace
from conclave.worker.serving.wire import load

from .test_streaming_engine import FEW, PROMPTS, beside_layers

Checkpoint = Callable[[int | str], Path]
HALF: dict[str, Any] = {
    **FEW,
    **{"dtype": "bfloat16", "stream_experts": False, "prefix_cache": False},
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are NaN when they are given back."""
    made = copies.Copies.__init__

    def poisoning(self: copies.Copies, *args: Any) -> None:
        made(self, args[0], args[1], args[2], poison=True)

    monkeypatch.setattr(copies.Copies, "__init__", poisoning)


def answers(engine: Engine) -> list[tuple[int, ...]]:
    greedy: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return [tuple(engine.generate(prompt, **greedy).token_ids) for prompt in PROMPTS]


def budget_of(resident: Engine, share: float) -> float:
    """GiB with room for a share of the plain layers."""
    layers = sum(layer.block for layer in resident.model.storage.layers)
    return (beside_layers(resident) + share * layers) / 2**30


@pytest.mark.parametrize("variant", ["1", "3", "6"])
def test_answers_are_those_of_a_model_that_fits(variant: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(variant)
    with Engine(folder, knobs=Knobs(memory_budget=1), **HALF) as resident:
        wanted = answers(resident)
    for prefetch, share in ((None, 0.7), (False, 0.6), (1, 0.6)):
        budget = budget_of(resident, share)
        knobs = Knobs(memory_budget=budget, prefetch=prefetch)
        with Engine(folder, knobs=knobs, **HALF) as engine:
            assert [answers(engine) for _ in range(2)] == [wanted] * 2
            use = engine.load.stream
            assert use is not None and use.coded and use.layers > use.slots > 0
            primed = use.copied_bytes - engine.load.steps * use.host_bytes
            assert 0 <= primed < use.host_bytes
            assert load(engine.load, 0.0, False).streaming.coded
        with Engine(folder, knobs=knobs, stream_coded=False, **HALF) as engine:
            assert answers(engine) == wanted
            plain = engine.load.stream
            assert plain is not None and not plain.coded and plain.host_bytes > use.host_bytes


def test_layers_that_fit_once_they_are_coded_are_not_copied(tiny_checkpoint: Checkpoint) -> None:
    folder, alone = tiny_checkpoint("1"), {**HALF, "max_sequences": 1}
    with Engine(folder, knobs=Knobs(memory_budget=1), **alone) as resident:
        wanted, storage = answers(resident), resident.model.storage
    layers, modules = storage.layers, sum(len(layer.modules) for layer in storage.layers)
    size = storage.largest_module + sum(layer.coded for layer in layers)
    budget = budget_of(resident, size / sum(layer.block for layer in layers)) + 1 / 2**20
    with Engine(folder, knobs=Knobs(memory_budget=budget), **alone) as engine:
        with engine.recorded() as recording:
            assert answers(engine) == wanted
        use = engine.load.stream
        assert use is not None and use.coded and use.layers == 0 == use.copied_bytes
        steps = engine.load.steps
    spans = recording.timeline
    assert not spans.of("copies") and len(spans.of("decoding")) == steps * modules
    events = chrome_trace({"": spans})["traceEvents"]
    assert {"compute", "decoding"} <= {event.get("cat") for event in events}


def test_weights_without_room_in_a_code_are_loaded_plain(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, left = tiny_checkpoint("1"), [9]

    def refusing(code: Code, tensor: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise CodeError("on purpose")
        return encode(code, tensor)

    with Engine(folder, knobs=Knobs(memory_budget=1), **HALF) as resident:
        wanted = answers(resident)
    monkeypatch.setattr(coded, "encode", refusing)
    knobs = Knobs(memory_budget=budget_of(resident, 0.6))
    with Engine(folder, knobs=knobs, **HALF) as engine:
        assert answers(engine) == wanted
        use = engine.load.stream
        assert use is not None and not use.coded and use.layers > 0
    assert "as if stream_coded were false: on purpose" in caplog.text


def test_pruned_weights_that_are_not_packed_are_loaded_plain(tiny_checkpoint: Checkpoint) -> None:
    """As on a CPU: their zeros are too many for the code of dense ones."""
    folder = tiny_checkpoint("3")
    with Engine(folder, knobs=Knobs(memory_budget=1, sparsity=0.6), **HALF) as resident:
        wanted = answers(resident)
    knobs = Knobs(memory_budget=budget_of(resident, 0.6), sparsity=0.6)
    with Engine(folder, knobs=knobs, **HALF) as engine:
        assert answers(engine) == wanted
        assert engine.load.stream is not None and not engine.load.stream.coded


def test_the_least_budget_that_is_told_is_enough(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    with Engine(folder, knobs=Knobs(memory_budget=1), **HALF) as resident:
        storage = resident.model.storage
        blocks = [layer.block for layer in storage.layers]
        codes = [layer.coded_modules for layer in storage.layers]
    for prefetch in (0, 1, 2):
        layers = least_of_either(blocks, codes, storage.largest_module, prefetch)
        least = beside_layers(resident) + layers
        knobs = Knobs(memory_budget=(least - 1) / 2**30, prefetch=prefetch)
        with pytest.raises(ConfigError, match="the least for this model"):
            Engine(folder, knobs=knobs, **HALF)
        knobs = Knobs(memory_budget=(least + 1) / 2**30, prefetch=prefetch)
        with Engine(folder, knobs=knobs, **HALF) as engine:
            assert engine.generate(PROMPTS[1], max_tokens=2).token_ids
