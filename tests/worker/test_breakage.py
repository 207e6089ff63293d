"""What NaN and failures leave behind: nothing that a neighbour or a later request could read."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine, Knobs
from conclave.worker.errors import Unavailable
from conclave.worker.memory.host import HostBlock
from conclave.worker.running.batch import Chunk
from conclave.worker.running.caches import PlainCaches

TinyCheckpoint = Callable[[int | str], Path]

SMALL: dict[str, Any] = {"max_context": 96, "kv_tokens": 240, "block_size": 4, "threads": 1}
ASKED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
POISON = 77
PROMPTS = [[10 + number, *range(100, 120)] for number in range(8)]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: TinyCheckpoint) -> list[list[int]]:
    with Engine(tiny_checkpoint(8), **SMALL) as engine:
        return [engine.generate(prompt, **ASKED).token_ids for prompt in PROMPTS]


TIGHT = {"kv_tokens": 96, "kv_host_gib": 0.01}
"""So few that most blocks go to the host and come back."""


@pytest.fixture(
    params=[{"prefix_cache": True}, {"prefix_cache": False}, TIGHT],
    ids=["prefix cache", "no prefix cache", "host"],
)
def engine(tiny_checkpoint: TinyCheckpoint, request: Any) -> Iterator[Engine]:
    """A model that makes NaN of one token; input and output embeddings are apart."""
    settings = {**SMALL, **request.param, "max_step_tokens": 16}
    with Engine(tiny_checkpoint(8), **settings) as engine:
        engine.model.runner.decoder.embedding.weight[POISON] = torch.nan
        yield engine


def assert_clean(engine: Engine) -> None:
    """After a further step no block holds NaN, and none is held."""
    engine.generate([9], **ASKED)
    assert isinstance(engine.model.runner.caches, PlainCaches)
    for caches in engine.model.runner.caches.tensors.values():
        assert not any(cache.isnan().any() for cache in caches)
    assert [pool.used for pool in engine.load.pools] == [0, 0]


def answers(engine: Engine) -> list[list[int]]:
    streams = [engine.stream(prompt, **ASKED) for prompt in PROMPTS]
    return [stream.result().token_ids for stream in streams]


@pytest.mark.parametrize("place", [0, 5, 39, 40], ids=["first", "early", "last", "generated"])
def test_nan_stays_with_its_request(
    engine: Engine, expected: list[list[int]], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(200, 240))
    if place < 40:
        prompt[place] = POISON
        asked = ASKED
    else:  # the model itself says it, and reads it in the next step
        asked = {**ASKED, "logit_bias": {POISON: 100.0}}
    for _ in range(2):
        streams = [engine.stream(each, **ASKED) for each in PROMPTS]
        broken = engine.stream(prompt, **asked)
        with pytest.raises(Unavailable, match="NaN"):
            broken.result()
        assert [stream.result().token_ids for stream in streams] == expected
        assert answers(engine) == expected
    assert_clean(engine)


def test_sharers_of_a_prefix_go_on(engine: Engine, expected: list[list[int]]) -> None:
    prefix = PROMPTS[0]
    with engine.step(prefix, **ASKED) as stepper:
        step = stepper.open()
        with pytest.raises(Unavailable, match="NaN"):
            engine.generate([*prefix, *expected[0][:3], POISON, 5, 6, 7], **ASKED)
        while step.end is None:
            assert answers(engine)[1:3] == expected[1:3]
            step = stepper.take(step.ids[:1])
    assert [token.id for token in stepper.tokens] == expected[0]
    assert engine.generate(prefix, **ASKED).token_ids == expected[0]
    assert_clean(engine)


def test_what_a_failed_step_has_written_is_wiped(
    engine: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine.model.runner
    forward, caches = runner.forward, runner.caches
    assert isinstance(caches, PlainCaches)

    def fail(chunks: list[Chunk]) -> torch.Tensor:
        forward(chunks)
        for chunk in chunks:
            for number, group in enumerate(runner.groups):
                blocks = [block for block in chunk.tables[number] if block >= 0]
                for layer in group.layers:
                    for cache in caches.tensors[layer]:
                        cache[blocks] = torch.nan
        raise RuntimeError("half done")

    for _ in range(3):
        monkeypatch.setattr(runner, "forward", fail)
        with pytest.raises(Unavailable, match="half done"):
            engine.generate(PROMPTS[3], **ASKED)
        monkeypatch.setattr(runner, "forward", forward)
        assert answers(engine) == expected
    assert_clean(engine)


def test_hung_engine_is_seen_by_its_age(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(tiny_checkpoint(1), **SMALL) as engine:
        forward = engine.model.runner.forward
        go_on = threading.Event()

        def hang(chunks: list[Chunk]) -> torch.Tensor:
            assert go_on.wait(30)
            return forward(chunks)

        time.sleep(0.1)
        assert engine.step_age == 0, "an idle engine has no age"
        monkeypatch.setattr(engine.model.runner, "forward", hang)
        stream = engine.stream([5, 6], **ASKED)
        ages = []
        for _ in range(4):
            time.sleep(0.1)
            ages.append(engine.step_age)
        assert ages == sorted(ages) and ages[0] > 0.05 and ages[-1] > 0.3
        go_on.set()
        stream.result()
        with engine.step([5], **ASKED) as stepper:
            stepper.open()
            time.sleep(0.2)
            assert engine.step_age == 0, "nor has one whose callers think"


@pytest.mark.parametrize("broken", ["turn", "state"])
def test_a_broken_engine_answers_and_lets_the_host_s_memory_go(
    tiny_checkpoint: TinyCheckpoint, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[HostBlock] = []
    block = HostBlock.__init__

    def kept(self: HostBlock, *args: Any, **kwargs: Any) -> None:
        block(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(HostBlock, "__init__", kept)
    settings: dict[str, Any] = {
        **{"max_context": 96, "block_size": 4, "threads": 1, "device": "cpu"},
        **{"max_sequences": 4, "max_step_tokens": 32, "kv_host_gib": 0.01},
    }
    knobs = Knobs(memory_budget=0.0168)  # hardly more than the least
    engine = Engine(tiny_checkpoint(1), knobs=knobs, **settings)
    assert engine.load.stream is not None and len(made) == engine.load.stream.layers + 2

    def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engine._loop, broken, fail)
    with pytest.raises(Unavailable):
        engine.stream([5, 6], **ASKED).result()
    engine._thread.join(30)
    assert not engine.alive and all(each.size for each in made)
    engine.close()
    engine.close()
    assert not any(each.size for each in made)
