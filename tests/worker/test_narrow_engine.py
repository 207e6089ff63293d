"""The engine over a cache of narrow numbers: same answers however they are batched, no row lost."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine, Knobs
from conclave.worker.errors import ConfigError, InvalidRequest, Overloaded
from conclave.worker.model.config import ModelConfig
from conclave.worker.narrow import expected_token_bytes
from conclave.worker.running.caches import NarrowCaches
from conclave.worker.running.runner import ModelRunner
from conclave.worker.serving import wire

TinyCheckpoint = Callable[[int | str], Path]
SMALL: dict[str, Any] = {"max_context": 96, "kv_tokens": 4096, "block_size": 4, "threads": 1}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def prompts(count: int) -> list[list[int]]:
    """Of mixed lengths; some begin alike."""
    draw = random.Random(5)
    beginning = [draw.randrange(3, 290) for _ in range(16)]
    return [
        [*beginning[: draw.choice([0, 16])], *(draw.randrange(3, 290) for _ in range(length))]
        for length in (draw.randrange(1, 40) for _ in range(count))
    ]


def caches_of(engine: Engine) -> NarrowCaches:
    caches = engine.model.runner.caches
    assert isinstance(caches, NarrowCaches)
    return caches


def assert_no_row_leaked(engine: Engine, rows: int | None = None) -> None:
    """Rows of the pools, of which there were so many, are held by the prefix cache alone."""
    engine.close()
    blocks = engine._loop.scheduler.blocks
    assert all(pool.free == pool.blocks for pool in blocks.pools)
    blocks.forget()
    engine.model.runner.renew(blocks.take_renewed())
    free = [use.rows - use.used for use in caches_of(engine).use()]
    assert free == [rows or use.rows for use in caches_of(engine).use()]


@pytest.mark.parametrize(
    ("variant", "error"),
    [
        *((1, 0.005), (1, 0.2), (3, 0.01), (4, 0.005)),
        *(("5-small-table", 0.2), (6, 0.01), (11, 0.2)),
    ],
)
def test_many_at_once_equal_one_at_a_time(
    tiny_checkpoint: TinyCheckpoint, variant: int | str, error: float
) -> None:
    folder, asked = tiny_checkpoint(variant), prompts(12)
    lengths = [random.Random(i).randrange(1, 16) for i in range(len(asked))]

    def run(at_once: bool, **settings: object) -> tuple[list[list[int]], Engine]:
        engine = Engine(folder, knobs=Knobs(max_error=error), **{**SMALL, **settings})
        streams = []
        for prompt, length in zip(asked, lengths, strict=True):
            streams.append(engine.stream(prompt, max_tokens=length, **GREEDY))
            if not at_once:
                streams[-1].result()
        answers = [stream.result().token_ids for stream in streams]
        layers = [layer for use in caches_of(engine).use() for layer in use.layers]
        assert all(layer.heads and layer.largest <= error for layer in layers)
        assert_no_row_leaked(engine)
        return answers, engine

    alone, _ = run(False, prefix_cache=False)
    together, _ = run(True, prefix_cache=False)
    assert together == alone
    cached, engine = run(True, max_sequences=5)
    assert cached == alone and engine.load.cached_tokens > 0
    squeezed, engine = run(True, kv_tokens=120, max_step_tokens=24)
    assert squeezed == alone and engine.load.preemptions > 0


def test_narrow_is_smaller(tiny_checkpoint: TinyCheckpoint) -> None:
    sizes = []
    for knobs in (Knobs(), Knobs(max_error=0.01), Knobs(max_error=0.3)):
        with Engine(tiny_checkpoint(1), knobs=knobs, **SMALL) as engine:
            sizes.append(engine.model.cache.bytes)
    assert sizes[0] > 2 * sizes[1] > 2 * sizes[2]


def test_a_full_pool_preempts(tiny_checkpoint: TinyCheckpoint, full: Callable[..., None]) -> None:
    """With room for the second digits of one or two sequences, all end, with the same answers."""
    folder, asked = tiny_checkpoint(1), prompts(8)
    knobs = Knobs(max_error=0.005)
    with Engine(folder, knobs=knobs, **SMALL) as roomy:
        expected = [roomy.generate(each, max_tokens=12, **GREEDY).token_ids for each in asked]
    full(1000)
    engine = Engine(folder, knobs=knobs, **SMALL)
    streams = [engine.stream(each, max_tokens=12, **GREEDY) for each in asked]
    assert [stream.result().token_ids for stream in streams] == expected
    assert engine.load.preemptions > 0
    assert_no_row_leaked(engine, 1000)


def test_a_step_without_memory_leaves_no_row_taken(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it stored is stored again: in new places, as nothing else gives rows back."""
    folder, asked = tiny_checkpoint(1), prompts(8)
    knobs = Knobs(max_error=0.005)
    with Engine(folder, knobs=knobs, **SMALL) as roomy:
        expected = [roomy.generate(each, max_tokens=12, **GREEDY).token_ids for each in asked]
    engine = Engine(folder, knobs=knobs, **SMALL)
    forward = engine.model.runner.forward

    def short(chunks: list[Any]) -> torch.Tensor:
        logits = forward(chunks)  # which is written when memory runs out
        if len(chunks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    monkeypatch.setattr(engine.model.runner, "forward", short)
    streams = [engine.stream(each, max_tokens=12, **GREEDY) for each in asked]
    assert [stream.result().token_ids for stream in streams] == expected
    assert engine.load.preemptions > 0
    assert_no_row_leaked(engine)


def test_a_pool_that_one_sequence_fills_refuses_it(
    tiny_checkpoint: TinyCheckpoint, full: Callable[..., None]
) -> None:
    full(8)
    with Engine(tiny_checkpoint(1), knobs=Knobs(max_error=0.005), **SMALL) as engine:
        streams = [engine.stream(each, max_tokens=12, **GREEDY) for each in prompts(3)]
        for stream in streams:
            with pytest.raises(Overloaded, match="allow a larger error"):
                stream.result()
        assert engine.alive
    assert_no_row_leaked(engine, 8)


@pytest.mark.parametrize("rows", [120, 160, 300])
def test_a_pool_that_passed_blocks_fill_is_emptied_once(
    rows: int, tiny_checkpoint: TinyCheckpoint, full: Callable[..., None]
) -> None:
    """A window moves on, and what it leaves to the prefix cache takes the rows that come next."""
    full(rows)
    draw = random.Random(3)
    prompt = [draw.randrange(3, 290) for _ in range(60)]
    settings = SMALL | {"max_step_tokens": 16}
    with Engine(tiny_checkpoint(1), knobs=Knobs(max_error=0.005), **settings) as engine:
        stream = engine.stream(prompt, max_tokens=8, **GREEDY)
        try:
            assert len(stream.result().token_ids) == 8
        except Overloaded:
            assert rows == 120
        assert engine.load.preemptions == 1
    assert_no_row_leaked(engine, rows)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives pools so few rows."""

    def limit(rows: int) -> None:
        made = ModelRunner.__init__

        def init(self: ModelRunner, *arguments: Any) -> None:
            made(self, *arguments)
            for group in caches_of_runner(self)._groups:
                group.overflow.count.fill_(rows)

        monkeypatch.setattr(ModelRunner, "__init__", init)

    return limit


def caches_of_runner(runner: ModelRunner) -> NarrowCaches:
    assert isinstance(runner.caches, NarrowCaches)
    return runner.caches


def test_what_was_stored_is_told(tiny_checkpoint: TinyCheckpoint) -> None:
    with Engine(tiny_checkpoint(1), knobs=Knobs(max_error=0.005), **SMALL) as engine:
        engine.generate([5, 6, 7], max_tokens=4, **GREEDY)
        told = wire.load(replace(engine.load, narrow=caches_of(engine).use()), 0.0, False)
    full, sliding = (pool.narrow for pool in told.pools)
    assert full.bits == sliding.bits == 8 and 0 < full.used <= full.rows
    assert [layer.layer for layer in (*sliding.layers, *full.layers)] == [0, 1, 2, 3, 4, 5]
    stored = {
        layer.heads // kv_heads
        for own, kv_heads in ((full, 1), (sliding, 2))
        for layer in own.layers
    }
    assert stored == {6}  # the last token of an answer is not stored
    for layer in (*full.layers, *sliding.layers):
        assert 0 < layer.seconds <= layer.heads and 0 < layer.largest <= 0.005


@pytest.mark.parametrize(
    ("layer", "sizes", "kind"),
    [(2, {"head_dim": 32}, "sliding"), (3, {"num_key_value_heads": 1}, "full-attention")],
)
def test_layers_of_a_kind_that_differ_are_refused(
    layer: int, sizes: dict[str, int], kind: str
) -> None:
    """A format, a block table and a pool serve all layers of a kind."""
    config = ModelConfig.parse(
        {
            **{"model_type": "gemma4_text", "num_hidden_layers": 6, "head_dim": 16},
            "layer_types": [f"{kind}_attention" for kind in ("sliding",) * 3 + ("full",) * 3],
            "per_layer_config": {str(layer): sizes},
        }
    )
    with pytest.raises(ConfigError, match=rf"{kind} layers.*layer {layer} .*leave it out"):
        expected_token_bytes(config, 0.01, 2)
    assert len(expected_token_bytes(config, None, 2)) == 2


def test_a_request_may_ask_for_less_error(tiny_checkpoint: TinyCheckpoint) -> None:
    """Its numbers are stored within its own limit, and not shared with others'."""
    prompt = list(range(20, 60))
    with Engine(tiny_checkpoint(1), knobs=Knobs(max_error=0.05), **SMALL) as engine:
        intake = engine.intake
        engine.generate(prompt, max_tokens=4, **GREEDY)
        before = seconds_of(engine)

        def ask(error: float | None) -> int:
            done: list[Any] = []
            request = intake.generation(
                prompt, {"max_tokens": 4, **GREEDY}, done.extend, knobs=Knobs(max_error=error)
            )
            cached = engine.load.cached_tokens
            engine.submit(request)
            while not any(hasattr(event, "usage") for event in done):
                pass
            return engine.load.cached_tokens - cached

        assert ask(None) > 0
        assert ask(0.004) == 0
        assert all(late > early for early, late in zip(before, seconds_of(engine), strict=True))
        assert ask(0.004) > 0


def seconds_of(engine: Engine) -> list[int]:
    return [layer.seconds for use in caches_of(engine).use() for layer in use.layers]


def test_more_than_a_worker_can_promise_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with Engine(tiny_checkpoint(1), knobs=Knobs(max_error=0.3), **SMALL) as engine:
        assert engine.model.precision.kv_error > 0.01
        with pytest.raises(InvalidRequest, match=r"knobs.max_error.*can be kept within"):
            engine.intake.generation([5], {}, lambda _: None, knobs=Knobs(max_error=0.01))
    with Engine(tiny_checkpoint(1), **SMALL) as engine:
        engine.intake.generation([5], {}, lambda _: None, knobs=Knobs(max_error=0.001))
