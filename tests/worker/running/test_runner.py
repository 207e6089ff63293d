"""The runner's own promises: order of logits, rows left out, slots, and what a step may read."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conclave.worker.model.config import ModelConfig, cache_groups
from conclave.worker.model.decoder import Decoder
from conclave.worker.running.batch import Chunk, build_step
from conclave.worker.running.caches import PlainCaches, Tensors
from conclave.worker.running.recording import can_record
from conclave.worker.running.runner import ModelRunner
from conclave.worker.weights import load_decoder

CPU = torch.device("cpu")
TOKENS = [11, 7, 300, 42, 5, 6, 90, 17, 230, 8, 9]


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Callable[[int | str], Path]) -> ModelRunner:
    folder = tiny_checkpoint(4)
    config = ModelConfig.load(folder)
    decoder = load_decoder(folder, config, CPU, torch.float32)
    return runner_of(decoder, config, (16, 12))


def runner_of(decoder: Decoder, config: ModelConfig, blocks: tuple[int, ...]) -> ModelRunner:
    caches = PlainCaches.empty(config, blocks, 4, CPU, torch.float32)
    return ModelRunner(decoder, config, caches, 4, CPU, torch.float32)


def tensors_of(runner: ModelRunner) -> Tensors:
    assert isinstance(runner.caches, PlainCaches)
    return runner.caches.tensors


def chunk(tokens: list[int], start: int, logits: int, first_block: int = 0) -> Chunk:
    table = range(first_block, first_block + 4)
    return Chunk(tokens, start, (table, table), logits)


def test_cache_shapes(runner: ModelRunner) -> None:
    groups = cache_groups(runner.config)
    assert [group.window for group in groups] == [None, 8]
    for group, blocks in zip(groups, (16, 12), strict=True):
        for layer in group.layers:
            head_dim = runner.config.layers[layer].head_dim
            for cache in tensors_of(runner)[layer]:
                assert cache.shape == (blocks, 4, 1, head_dim)
    assert tensors_of(runner).keys() == {0, 1, 2, 3}


def test_logits_come_in_the_order_of_the_chunks(runner: ModelRunner) -> None:
    alone = runner.forward([chunk(TOKENS, 0, 11)])
    assert alone.dtype == torch.float32 and alone.shape == (11, 512)
    runner.forward([chunk(TOKENS[:6], 0, 0)])
    mixed = runner.forward(
        [chunk(TOKENS[:5], 0, 2, 4), chunk([TOKENS[6]], 6, 1), chunk(TOKENS[:3], 0, 3, 8)]
    )
    expected = torch.cat([alone[3:5], alone[6:7], alone[:3]])
    assert torch.allclose(mixed, expected, atol=1e-4)


def test_no_logits_wanted(runner: ModelRunner) -> None:
    assert runner.forward([chunk(TOKENS[:4], 0, 0)]).shape == (0, 512)
    assert runner.forward([chunk([TOKENS[4]], 4, 0)]).shape == (0, 512)


def test_decoding_twice_is_identical(runner: ModelRunner) -> None:
    runner.forward([chunk(TOKENS, 0, 0)])
    first = runner.forward([chunk([3], 11, 1)])
    assert torch.equal(first, runner.forward([chunk([3], 11, 1)]))


def test_recycled_blocks_leave_no_trace(runner: ModelRunner) -> None:
    clean = runner.forward([chunk(TOKENS, 0, 1)])
    runner.forward([chunk([token + 1 for token in TOKENS], 0, 0)])
    again = runner.forward([chunk(TOKENS[:2], 0, 0)])
    again = runner.forward([chunk(TOKENS[2:], 2, 1)])
    assert torch.allclose(clean, again, atol=1e-4)


def test_slots_and_tables() -> None:
    tables = ([5, 2, 7], [-1, 6, 3])
    decode = Chunk([1], 9, tables, 1)
    prefill = Chunk([2, 3, 4], 6, tables, 1)
    step = build_step([prefill, decode], [None, 3], 4, CPU)
    assert step.tokens.tolist() == [1, 2, 3, 4]
    assert step.positions.tolist() == [9, 6, 7, 8]
    assert step.slots[0].tolist() == [29, 10, 11, 28]
    assert step.slots[1].tolist() == [13, 26, 27, 12]
    assert step.logit_rows is not None and step.logit_rows.tolist() == [3, 0]
    decoding, prefilling = step.parts
    assert decoding.tables[0].tolist() == [[5, 2, 7]]
    assert decoding.tables[1].tolist() == [[6, 3]]
    assert prefilling.offsets[1].tolist() == [2] and prefilling.queries == 3
    assert not step.decodes


def test_a_block_missing_inside_the_window_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        build_step([Chunk([1], 9, ([-1, 2, 3],), 1)], [None], 4, CPU)


@pytest.mark.parametrize("variant", ["1", "3", "4", "8", "11"])
def test_recording_gives_the_same_numbers(
    tiny_checkpoint: Callable[[int | str], Path], variant: str
) -> None:
    """Any number of sequences of any lengths, none of which the recording was made with."""
    config = ModelConfig.load(tiny_checkpoint(variant))
    decoder = load_decoder(tiny_checkpoint(variant), config, CPU, torch.float32)
    blocks = tuple(64 for _ in cache_groups(config))
    recorded, plain = (runner_of(decoder, config, blocks) for _ in range(2))
    assert recorded._recorded is not None
    plain._recorded = None
    draw = random.Random(3)
    for sequences in (1, 2, 3, 7, 1, 5):
        starts = [draw.randrange(0, 30) for _ in range(sequences)]
        tables = [list(range(8 * row, 8 * row + 8)) for row in range(sequences)]
        chunks = [
            Chunk([draw.randrange(300)], start, (table,) * len(blocks), 1)
            for start, table in zip(starts, tables, strict=True)
        ]
        assert torch.equal(recorded.forward(chunks), plain.forward(chunks))
    for layer, caches in tensors_of(recorded).items():
        others = tensors_of(plain)[layer]
        assert all(torch.equal(a, b) for a, b in zip(caches, others, strict=True))


def test_models_with_experts_are_not_recorded(
    tiny_checkpoint: Callable[[int | str], Path],
) -> None:
    config = ModelConfig.load(tiny_checkpoint(6))
    assert not can_record(config, CPU)
