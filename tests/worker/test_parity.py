"""Our decoder against transformers, float32, every variant and every way through the worker."""

import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker.model.config import CacheGroup, ModelConfig, cache_groups
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.running.batch import Chunk
from conclave.worker.running.caches import PlainCaches
from conclave.worker.running.runner import ModelRunner
from conclave.worker.weights import load_decoder

Checkpoints = Callable[[int | str], Path]
Reference = Callable[[str, list[int]], torch.Tensor]

VARIANTS = ["1", "2", "3", "4", "5", "5-small-table", "6", "7", "8", "9", "10", "11"]
VARIANTS += ["12", "12-wrapper"]
CPU = torch.device("cpu")
BLOCK = 4
LONG = [random.Random(1).randrange(3, 300) for _ in range(21)]
SHORT = LONG[5:16]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path) -> Decoder:
    return load_decoder(folder, ModelConfig.load(folder), CPU, torch.float32)


def run_dense(decoder: Decoder, sequences: list[list[int]]) -> torch.Tensor:
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = DenseAttention(decoder.config, lengths)
    with torch.no_grad():
        return decoder.logits(decoder(tokens, positions, attention))


@functools.cache
def runner_of(folder: Path) -> tuple[ModelRunner, PlainCaches]:
    """A checkpoint's runner over caches of 24 blocks; one for all tests, as it takes a while."""
    decoder = load(folder)
    blocks = tuple(24 for _ in cache_groups(decoder.config))
    caches = PlainCaches.empty(decoder.config, blocks, BLOCK, CPU, torch.float32)
    return ModelRunner(decoder, decoder.config, caches, BLOCK, CPU, torch.float32), caches


class Paged:
    """A runner whose blocks are handed out in random order and taken back when they slide out.

    Blocks that belong to no sequence hold NaN: who reads one shows it.
    """

    def __init__(self, folder: Path) -> None:
        self.runner, caches = runner_of(folder)
        self.groups = cache_groups(self.runner.decoder.config)
        self.caches = caches.tensors
        self.free = [random.Random(2).sample(range(24), 24) for _ in self.groups]
        self.tables: dict[str, tuple[list[int], ...]] = {}
        self.done: dict[str, int] = {}
        self.fill(range(24), torch.nan)

    def fill(self, blocks: range | list[int], value: float) -> None:
        for group in range(len(self.groups)):
            self.fill_group(group, list(blocks), value)

    def fill_group(self, group: int, blocks: list[int], value: float) -> None:
        for layer in self.groups[group].layers:
            for cache in self.caches[layer]:
                cache[blocks] = value

    def chunk(self, name: str, tokens: list[int], logits: int) -> Chunk:
        start = self.done.setdefault(name, 0)
        tables = self.tables.setdefault(name, tuple([] for _ in self.groups))
        self.done[name] = start + len(tokens)
        for number, (group, table) in enumerate(zip(self.groups, tables, strict=True)):
            self.slide(number, group, table, start)
            while len(table) * BLOCK < start + len(tokens):
                table.append(self.free[number].pop())
                self.fill_group(number, table[-1:], 0.0)
        return Chunk(tokens, start, tables, logits)

    def slide(self, number: int, group: CacheGroup, table: list[int], start: int) -> None:
        if group.window is None:
            return
        for index in range(max(0, start - group.window + 1) // BLOCK):
            if table[index] >= 0:
                self.fill_group(number, [table[index]], torch.nan)
                self.free[number].insert(0, table[index])
                table[index] = -1

    def run(self, *pieces: tuple[str, list[int]]) -> torch.Tensor:
        """Logits of all tokens of (sequence name, its next tokens) run in one step."""
        return self.runner.forward([self.chunk(name, ids, len(ids)) for name, ids in pieces])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < 1e-4


@every_variant
def test_full_forward(
    variant: str, tiny_checkpoint: Checkpoints, reference_logits: Reference
) -> None:
    logits = run_dense(load(tiny_checkpoint(variant)), [LONG, SHORT, SHORT])
    expected = [reference_logits(variant, tokens) for tokens in (LONG, SHORT, SHORT)]
    assert_close(logits, torch.cat(expected))


@every_variant
@pytest.mark.parametrize("cuts", [(21,), (13, 8), (1, 20), (3, 9, 1, 8)], ids=str)
def test_chunked_prefill(
    variant: str, cuts: tuple[int, ...], tiny_checkpoint: Checkpoints, reference_logits: Reference
) -> None:
    paged = Paged(tiny_checkpoint(variant))
    rest = iter(LONG)
    logits = [paged.run(("a", [next(rest) for _ in range(cut)])) for cut in cuts]
    assert_close(torch.cat(logits), reference_logits(variant, LONG))


@every_variant
def test_decode_past_two_windows(
    variant: str, tiny_checkpoint: Checkpoints, reference_logits: Reference
) -> None:
    paged = Paged(tiny_checkpoint(variant))
    logits = [paged.run(("a", [token])) for token in LONG]
    assert_close(torch.cat(logits), reference_logits(variant, LONG))


@every_variant
def test_a_step_of_decode_and_prefill(
    variant: str, tiny_checkpoint: Checkpoints, reference_logits: Reference
) -> None:
    paged = Paged(tiny_checkpoint(variant))
    long, short = reference_logits(variant, LONG), reference_logits(variant, SHORT)
    paged.run(("a", LONG[:17]), ("b", SHORT[:2]))
    mixed = paged.run(
        ("c", SHORT[:5]), ("a", [LONG[17]]), ("b", SHORT[2:7]), ("d", [LONG[0]]), ("e", LONG[:3])
    )
    assert_close(mixed, torch.cat([short[:5], long[17:18], short[2:7], long[:1], long[:3]]))
    batch = paged.run(("d", [LONG[1]]), ("a", [LONG[18]]), ("c", [SHORT[5]]), ("b", [SHORT[7]]))
    assert_close(batch, torch.stack([long[1], long[18], short[5], short[7]]))


@pytest.mark.parametrize("variant", ["1", "2", "4", "6", "8", "11", "12", "12-wrapper"])
def test_older_config_style(
    variant: str, tiny_checkpoint: Checkpoints, reference_logits: Reference, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(variant)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    write_hub_style(values.get("text_config", values))
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_close(run_dense(load(tmp_path), [LONG]), reference_logits(variant, LONG))


def write_hub_style(text: dict[str, Any]) -> None:
    """Replaces `per_layer_config` by the two keys that Hub checkpoints have."""
    overrides = text.pop("per_layer_config", {})
    full = overrides[str(text["num_hidden_layers"] - 1)]
    text["global_head_dim"] = full["head_dim"]
    # Where attention_k_eq_v is false this key must not count.
    text["num_global_key_value_heads"] = full.get("num_key_value_heads", 1)


def test_training_through_dense_attention(tiny_checkpoint: Checkpoints) -> None:
    decoder = load(tiny_checkpoint(7))
    run_dense(decoder, [SHORT])
    tokens = torch.tensor(SHORT + SHORT)
    positions = torch.arange(len(SHORT)).repeat(2)
    attention = DenseAttention(decoder.config, [len(SHORT)] * 2)
    logits = decoder.logits(decoder(tokens, positions, attention))
    torch.nn.functional.cross_entropy(logits, tokens).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
