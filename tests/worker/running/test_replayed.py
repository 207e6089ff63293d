"""Decode steps on padded inputs at fixed places, with recordings that a CPU can make: calls."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conclave.worker import Engine, Knobs, loading
from conclave.worker.model.config import ModelConfig, cache_groups
from conclave.worker.model.decoder import Decoder
from conclave.worker.running import replayed
from conclave.worker.running.batch import Chunk
from conclave.worker.running.caches import PlainCaches
from conclave.worker.running.inputs import DecodeInputs, DecodeShape
from conclave.worker.running.replayed import Replaying
from conclave.worker.running.runner import ModelRunner
from conclave.worker.weights import load_decoder

TinyCheckpoint = Callable[[int | str], Path]
CPU, BLOCK, CONTEXT, MOST = torch.device("cpu"), 4, 400, 7


class Recorder:
    """Repeats calls; counts them."""

    def __init__(self, fails: bool = False) -> None:
        self.recorded = self.replayed = 0
        self.fails = fails

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.fails:
            raise RuntimeError("on purpose")
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


def runner_of(
    decoder: Decoder, config: ModelConfig, recorder: Recorder | None = None
) -> ModelRunner:
    blocks = tuple(MOST * CONTEXT // BLOCK for _ in cache_groups(config))
    caches = PlainCaches.empty(config, blocks, BLOCK, CPU, torch.float32)
    replaying = None if recorder is None else Replaying(recorder, MOST, CONTEXT)
    runner = ModelRunner(*(decoder, config, caches, BLOCK, CPU, torch.float32), replaying=replaying)
    runner._recorded = None
    return runner


def loaded(folder: Path) -> tuple[Decoder, ModelConfig]:
    config = ModelConfig.load(folder)
    return load_decoder(folder, config, CPU, torch.float32), config


def chunks_of(starts: list[int], groups: int, draw: random.Random) -> list[Chunk]:
    tables = [range(100 * row, 100 * row + 100) for row in range(len(starts))]
    return [
        Chunk([draw.randrange(300)], start, (table,) * groups, 1)
        for start, table in zip(starts, tables, strict=True)
    ]


def stored(runner: ModelRunner) -> list[Tensor]:
    assert isinstance(runner.caches, PlainCaches)
    return [own for pair in runner.caches.tensors.values() for own in pair]


@pytest.mark.parametrize("variant", ["1", "3", "4", "6", "8", "11"])
def test_padded_steps_give_the_same_numbers(tiny_checkpoint: TinyCheckpoint, variant: str) -> None:
    """Whatever the number of sequences and their lengths; and nothing else is stored."""
    decoder, config = loaded(tiny_checkpoint(variant))
    recorder = Recorder()
    padded, plain = runner_of(decoder, config, recorder), runner_of(decoder, config)
    groups, draw = len(cache_groups(config)), random.Random(3)
    for count in (1, 2, 3, 7, 1, 5, 6, 3, 1):
        starts = [draw.choice([0, 1, 30, 127, 128, 129, 399]) for _ in range(count)]
        chunks = chunks_of(starts, groups, draw)
        found, wanted = padded.forward(chunks), plain.forward(chunks)
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=2e-4)
    assert recorder.recorded and recorder.replayed
    for own, other in zip(stored(padded), stored(plain), strict=True):
        assert torch.allclose(own, other, atol=2e-4)


def test_a_size_is_recorded_when_it_comes_again(tiny_checkpoint: TinyCheckpoint) -> None:
    decoder, config = loaded(tiny_checkpoint(4))
    recorder = Recorder()
    runner = runner_of(decoder, config, recorder)

    def step(*starts: int) -> tuple[int, int]:
        runner.forward(chunks_of([*starts], len(cache_groups(config)), random.Random(0)))
        return recorder.recorded, recorder.replayed

    assert step(3) == (0, 0)
    assert step(5) == (1, 1)
    assert step(127) == (1, 2)
    assert step(128) == (1, 2)  # of twice as many blocks
    assert step(3, 4, 5) == (1, 2)
    assert step(1, 2, 3, 4) == (2, 3)  # as three, padded
    assert step(140) == (3, 4)


def test_the_one_that_was_not_used_for_longest_is_given_up(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replayed, "MOST_RECORDINGS", 2)
    decoder, config = loaded(tiny_checkpoint(4))
    recorder = Recorder()
    runner = runner_of(decoder, config, recorder)
    for count, recordings in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (2, 4), (4, 5)):
        for _ in range(2):
            starts = [5] * count
            runner.forward(chunks_of(starts, len(cache_groups(config)), random.Random(0)))
        assert recorder.recorded == recordings, count
    assert runner._replayed is not None and runner._replayed.recordings == 2


def test_what_cannot_be_recorded_runs(
    tiny_checkpoint: TinyCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    decoder, config = loaded(tiny_checkpoint(4))
    runner, plain = runner_of(decoder, config, Recorder(fails=True)), runner_of(decoder, config)
    for _ in range(4):
        chunks = chunks_of([3, 9], len(cache_groups(config)), random.Random(0))
        assert torch.allclose(runner.forward(chunks), plain.forward(chunks), atol=1e-4)
    assert caplog.text.count("not recorded any more: on purpose") == 1


def test_other_steps_are_not_replayed(tiny_checkpoint: TinyCheckpoint) -> None:
    """Prompts, steps without logits, and those of which each layer is watched."""
    decoder, config = loaded(tiny_checkpoint(4))
    recorder = Recorder()
    runner = runner_of(decoder, config, recorder)
    tables = (range(100),) * len(cache_groups(config))
    for _ in range(3):
        runner.forward([Chunk([5, 6, 7], 0, tables, 1)])
        runner.forward([Chunk([5], 3, tables, 0)])
        runner.watched = True
        runner.forward([Chunk([5], 3, tables, 1)])
        runner.watched = False
    assert not recorder.recorded


def test_the_first_step_of_a_size_gives_what_replays_give(tiny_checkpoint: TinyCheckpoint) -> None:
    decoder, config = loaded(tiny_checkpoint(3))
    runner = runner_of(decoder, config, Recorder())
    chunks = chunks_of([3, 50, 20], len(cache_groups(config)), random.Random(0))
    first = runner.forward(chunks).clone()
    for _ in range(2):
        assert torch.equal(runner.forward(chunks), first)


def test_sizes() -> None:
    def of(count: int, longest: int, most: tuple[int, int] = (64, 512)) -> DecodeShape:
        chunks = [Chunk([1], 0, ((), ()), 1)] * (count - 1) + [Chunk([1], longest - 1, (), 1)]
        return DecodeShape.of(chunks, [None, 100], 16, *most)

    for count in range(1, 65):
        rows = of(count, 5).rows
        assert count <= rows <= 64 and rows < 2 * count
    assert of(1, 1).widths == (32, 8)
    assert of(1, 512).widths == (32, 8) and of(1, 513).widths == (64, 8)
    assert of(50, 8192) == DecodeShape(64, (512, 8))
    assert of(50, 8000, (50, 510)) == DecodeShape(50, (510, 8))
    assert of(1, 20, (64, 5)).widths == (5, 5)


def test_inputs_lie_where_kernels_want_them() -> None:
    """At multiples of 16 bytes, whatever the sizes, and in the memory that is given."""
    for rows, widths in ((1, (3, 7)), (3, (5, 5)), (7, (1, 9))):
        shape = DecodeShape(rows, widths)
        memory = torch.zeros(shape.numbers, dtype=torch.int64)
        inputs = DecodeInputs(shape, memory)
        step, (part,) = inputs.step, inputs.step.parts
        tensors = [step.tokens, step.positions, inputs.limits, *step.slots]
        tensors += [*part.offsets, *part.tables]
        for tensor in tensors:
            assert (tensor.data_ptr() - memory.data_ptr()) % 16 == 0
            assert len(tensor) == rows
        tables = [range(20), range(20)]
        chunks = [Chunk([5], start, tuple(tables), 1) for start in range(min(widths))][:rows]
        inputs.fill(chunks, [0.5] * len(chunks), [None, 3], 1, True)
        assert step.tokens.tolist() == [5] * rows
        assert inputs.limits.tolist() == [0.5] * len(chunks) + [0.0] * (rows - len(chunks))
        assert step.slots[0].tolist() == [*range(len(chunks)), *[-1] * (rows - len(chunks))]


@pytest.mark.parametrize("experts", [False, True])
def test_rows_that_pad_repeat_the_shortest(experts: bool) -> None:
    """And see one key, or all that it sees where they must choose its experts."""
    shape = DecodeShape(4, (32, 3))
    inputs = DecodeInputs(shape, torch.full((shape.numbers,), -7))
    tables = [(range(100 * row, 100 * row + 40),) * 2 for row in range(3)]
    starts = [90, 41, 70]
    chunks = [
        Chunk([row], start, table, 1)
        for row, (start, table) in enumerate(zip(starts, tables, strict=True))
    ]
    inputs.fill(chunks, [0.1, 0.2, 0.3], [None, 5], 4, experts)
    step, (part,) = inputs.step, inputs.step.parts
    assert step.tokens.tolist() == [0, 1, 2, 1] and step.positions.tolist() == [90, 41, 70, 41]
    for group in range(2):
        assert step.slots[group].tolist() == [90, 441, 870, -1]
        assert torch.equal(part.tables[group][3], part.tables[group][1])
        offsets = part.offsets[group].tolist()
        assert offsets[3] == (offsets[1] if experts else 0)


def answers(folder: Path, count: int, **settings: Any) -> list[list[int]]:
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 290) for _ in range(draw.randrange(1, 40))] for _ in range(count)]
    sizes = {"max_context": 96, "kv_tokens": 4096, "block_size": 4, "threads": 1, **settings}
    with Engine(folder, **sizes) as engine:
        streams = [
            engine.stream(prompt, max_tokens=3 + number, temperature=0.0, ignore_eos=True)
            for number, prompt in enumerate(prompts)
        ]
        return [stream.result().token_ids for stream in streams]


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        *((1, {}), (6, {}), ("11", {"max_sequences": 3}), (3, {"kv_tokens": 128})),
        (3, {"knobs": Knobs(max_error=0.01)}),
        ("5-small-table", {"knobs": Knobs(max_error=0.2), "max_sequences": 5}),
    ],
)
def test_engines_answer_alike(
    tiny_checkpoint: TinyCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    variant: int | str,
    settings: dict[str, Any],
) -> None:
    """In plain and in narrow numbers, with preemptions, whatever the number of sequences."""
    folder = tiny_checkpoint(variant)
    wanted = answers(folder, 9, **settings)
    recorder = Recorder()
    monkeypatch.setattr(loading, "can_replay", lambda *_: True)
    monkeypatch.setattr(loading, "GraphRecorder", lambda _: recorder)
    assert answers(folder, 9, **settings) == wanted
    assert recorder.replayed
    recorder.replayed = 0
    assert answers(folder, 9, **settings, cuda_graphs=False) == wanted
    assert not recorder.replayed
