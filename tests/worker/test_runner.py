"""The runner's own promises: order of logits, rows left out, slots, and what a step may read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conclave.worker.batch import Chunk, build_step
from conclave.worker.model.config import ModelConfig, cache_groups
from conclave.worker.runner import ModelRunner
from conclave.worker.weights import load_decoder

CPU = torch.device("cpu")
TOKENS = [11, 7, 300, 42, 5, 6, 90, 17, 230, 8, 9]


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Callable[[int | str], Path]) -> ModelRunner:
    folder = tiny_checkpoint(4)
    config = ModelConfig.load(folder)
    decoder = load_decoder(folder, config, CPU, torch.float32)
    return ModelRunner(decoder, config, (16, 12), 4, CPU, torch.float32)


def chunk(tokens: list[int], start: int, logits: int, first_block: int = 0) -> Chunk:
    table = range(first_block, first_block + 4)
    return Chunk(tokens, start, (table, table), logits)


def test_cache_shapes(runner: ModelRunner) -> None:
    groups = cache_groups(runner.config)
    assert [group.window for group in groups] == [None, 8]
    for group, blocks in zip(groups, (16, 12), strict=True):
        for layer in group.layers:
            head_dim = runner.config.layers[layer].head_dim
            for cache in runner.caches[layer]:
                assert cache.shape == (blocks, 4, 1, head_dim)
    assert runner.caches.keys() == {0, 1, 2, 3}


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
    step = build_step([prefill, decode], [None, 3], 4, CPU, torch.float32)
    assert step.tokens.tolist() == [1, 2, 3, 4]
    assert step.positions.tolist() == [9, 6, 7, 8]
    assert step.slots[0].tolist() == [29, 10, 11, 28]
    assert step.slots[1].tolist() == [13, 26, 27, 12]
    assert step.logit_rows is not None and step.logit_rows.tolist() == [3, 0]
    decoding, prefilling = step.parts
    assert decoding.pages[0].tables.tolist() == [[5, 2, 7]]
    assert decoding.pages[1].tables.tolist() == [[6, 3]]
    assert prefilling.pages[1].offsets.tolist() == [2]
    seen = prefilling.pages[1].bias[0, 0] == 0
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_a_block_missing_inside_the_window_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        build_step([Chunk([1], 9, ([-1, 2, 3],), 1)], [None], 4, CPU, torch.float32)
