"""What the worst steps of a model take, as its allocator tells, against what is set aside."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conclave.worker import EngineConfig, SamplingParams
from conclave.worker.model.config import ModelConfig, cache_groups
from conclave.worker.running.batch import Chunk
from conclave.worker.running.caches import PlainCaches
from conclave.worker.running.runner import ModelRunner
from conclave.worker.running.sampler import sample, score
from conclave.worker.scheduling.sizing import plan_cache
from conclave.worker.scheduling.workspace import workspace
from conclave.worker.weights import load_decoder

CPU, FLOAT = torch.device("cpu"), torch.float32


def most_bytes(run: Callable[[], object], trace: Path) -> int:
    """The most that is allocated at once in `run`."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize(("variant", "rows", "tokens"), [("3", 4, 64), ("6", 32, 48)])
def test_the_worst_steps_fit(
    variant: str,
    rows: int,
    tokens: int,
    tiny_checkpoint: Callable[[int | str], Path],
    tmp_path: Path,
) -> None:
    folder, context, block = tiny_checkpoint(variant), 240, 4
    model, groups = ModelConfig.load(folder), cache_groups(ModelConfig.load(folder))
    config = EngineConfig(
        model=folder,
        max_context=context,
        max_sequences=rows,
        max_step_tokens=tokens,
        block_size=block,
    )
    plan = plan_cache(config, groups, 256, [g.bytes_per_token(4) for g in groups], 2**30)
    decoder = load_decoder(folder, model, CPU, FLOAT)
    caches = PlainCaches.empty(model, plan.blocks, block, CPU, FLOAT)
    runner = ModelRunner(decoder, model, caches, block, CPU, FLOAT)
    tables = tuple([number % count for number in range(context // block)] for count in plan.blocks)
    drawn: Any = [
        SimpleNamespace(sampling=SamplingParams(), seed=1, answer_length=0) for _ in range(rows)
    ]

    def scored() -> None:
        logits = runner.forward([Chunk([5] * tokens, context - tokens, tables, tokens)])
        score(logits, [5] * tokens, [4] * tokens)

    def mixed() -> None:
        chunks = [Chunk([5], context - 1, tables, 1) for _ in range(rows - 1)]
        rest = tokens - len(chunks)
        chunks.append(Chunk([5] * rest, context - rest, tables, 1))
        sample(runner.forward(chunks), drawn, [()] * rows)

    taken = max(most_bytes(run, tmp_path / "trace.json") for run in (scored, mixed))
    assert 0.3 * workspace(config, model, context, 4, 0) < taken
    assert taken < workspace(config, model, context, 4, 0)
