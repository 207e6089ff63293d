"""Recorded steps: every layer and every copy is there, and nothing is left behind."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from conclave.worker import Engine, Knobs
from conclave.worker.errors import Unavailable
from conclave.worker.memory.timeline import chrome_trace

from .test_streaming_engine import FEW, PROMPTS, beside_layers

Checkpoint = Callable[[int | str], Path]


def hooks(engine: Engine) -> int:
    layers = engine.model.runner.decoder.layers
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in layers)


@pytest.fixture(params=[None, False], ids=["ahead", "on demand"])
def streamed(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint) -> Iterator[Engine]:
    folder = tiny_checkpoint("1")
    with Engine(folder, knobs=Knobs(memory_budget=1), **FEW) as resident:
        layers = sum(layer.block for layer in resident.model.storage.layers)
        budget = (beside_layers(resident) + 0.6 * layers) / 2**30
    knobs = Knobs(memory_budget=budget, prefetch=request.param)
    with Engine(folder, knobs=knobs, **FEW) as engine:
        yield engine


def test_layers_and_copies_are_those_of_the_plan(streamed: Engine) -> None:
    settings = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    wanted = streamed.generate(PROMPTS[0], **settings).token_ids
    before, use = hooks(streamed), streamed.load.stream
    steps = streamed.load.steps
    assert use is not None
    with streamed.recorded() as recording:
        assert streamed.generate(PROMPTS[1], **settings).token_ids
        assert streamed.generate(PROMPTS[0], **settings).token_ids == wanted
    steps = streamed.load.steps - steps
    timeline = recording.timeline
    computed = Counter(span.layer for span in timeline.of("compute"))
    assert set(computed) == set(range(len(streamed.model.runner.decoder.layers)))
    assert set(computed.values()) == {steps}
    blocks = streamed.model.runner.stream.residency.blocks  # type: ignore[union-attr]
    copied = sum(blocks[span.layer] for span in timeline.of("copies") if span.layer is not None)
    now = streamed.load.stream
    assert now is not None and copied == now.copied_bytes - use.copied_bytes > 0
    assert len(timeline.of("waiting")) == steps * use.layers
    # On a CPU nothing overlaps but a copy with the waiting for it.
    busy = [span for span in timeline.spans if span.lane != "waiting"]
    assert all(one.end <= other.start for one, other in pairwise(busy))
    assert 0 < sum(span.seconds for span in busy) <= timeline.seconds
    assert hooks(streamed) == before
    streamed.generate(PROMPTS[1], **settings)
    assert recording.timeline is timeline


def test_a_model_that_fits_has_no_copies(tiny_checkpoint: Checkpoint) -> None:
    with Engine(tiny_checkpoint("1"), **FEW) as engine:
        with engine.recorded() as recording:
            engine.generate(PROMPTS[0], max_tokens=1)
            with pytest.raises(Unavailable, match="being recorded"), engine.recorded():
                pass
        lanes = {
            event.get("cat") for event in chrome_trace({"": recording.timeline})["traceEvents"]
        }
        assert "compute" in lanes and "copies" not in lanes


def test_a_closed_engine_records_nothing(tiny_checkpoint: Checkpoint) -> None:
    engine = Engine(tiny_checkpoint("1"), **FEW)
    with engine.recorded():
        engine.close()
    with pytest.raises(Unavailable), engine.recorded():
        pass
