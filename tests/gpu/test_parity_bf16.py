"""bfloat16 on the GPU: no further from transformers' float32 than transformers' own bfloat16 is.

transformers' eager and sdpa attention already differ by as much as 1 in these logits, so closeness
to either means nothing; all three are measured against the float32 truth, over the same sequences.
"""

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker.model.config import ModelConfig, cache_groups
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.running.batch import Chunk
from conclave.worker.running.caches import PlainCaches
from conclave.worker.running.runner import ModelRunner
from conclave.worker.weights import load_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

VARIANTS = ["1", "2", "3", "4", "5", "5-small-table", "6", "7", "8", "9", "10", "11"]
VARIANTS += ["12", "12-wrapper"]
LENGTH, COUNT = 21, 16
MARGINS = {"mean": 1.05, "99 %": 1.2, "largest": 3.0}
"""What our error may be, times the worse of eager and sdpa. Over 18 random models ours was 0.86 to
1.01 in the mean and 0.78 to 1.14 at 99 %; the largest of 172,000 errors is luck: between eager and
sdpa alone it differed by 0.35 to 1.8."""


def tiny_checkpoints() -> Any:
    """tests/worker/conftest.py, which pytest shares with its own folder only."""
    path = Path(__file__).parents[1] / "worker" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_checkpoints", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device("cuda")
    torch.set_float32_matmul_precision(before)


def reference_logits(
    variant: str, folder: Path, tokens: torch.Tensor, dtype: torch.dtype, attention: str
) -> torch.Tensor:
    """transformers' logits [COUNT, LENGTH, vocab] in float32."""
    model = tiny_checkpoints().read_reference(variant, folder, dtype=dtype)
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        logits: torch.Tensor = model.to(tokens.device)(tokens).logits.float()
    return logits


def dense_logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(LENGTH, device=tokens.device).repeat(COUNT)
    with torch.inference_mode():
        attention = DenseAttention(decoder.config, [LENGTH] * COUNT)
        logits = decoder.logits(decoder(tokens.flatten(), positions, attention))
    return logits.view(COUNT, LENGTH, -1)


def paged_logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Thirteen tokens of prefill, then one at a time."""
    config = decoder.config
    groups = cache_groups(config)
    blocks = (6 * COUNT,) * len(groups)
    caches = PlainCaches.empty(config, blocks, 4, tokens.device, torch.bfloat16)
    runner = ModelRunner(decoder, config, caches, 4, tokens.device, torch.bfloat16)
    rows = tokens.tolist()
    tables = [(range(6 * row, 6 * row + 6),) * len(groups) for row in range(COUNT)]
    pieces = [(0, 13), *((start, start + 1) for start in range(13, LENGTH))]
    logits = []
    for begin, end in pieces:
        chunks = [
            Chunk(row[begin:end], begin, table, end - begin)
            for row, table in zip(rows, tables, strict=True)
        ]
        logits.append(runner.forward(chunks).view(COUNT, end - begin, -1))
    return torch.cat(logits, 1)


def errors(logits: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    ordered = (logits - truth).abs().flatten().sort().values
    return {
        "mean": ordered.mean().item(),
        "99 %": ordered[int(0.99 * len(ordered))].item(),
        "largest": ordered[-1].item(),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_worse_than_transformers(variant: str, tmp_path: Path, device: torch.device) -> None:
    folder = tiny_checkpoints().write_checkpoint(variant, tmp_path)
    draw = random.Random(3)
    rows = [[draw.randrange(3, 300) for _ in range(LENGTH)] for _ in range(COUNT)]
    tokens = torch.tensor(rows, device=device)
    truth = reference_logits(variant, folder, tokens, torch.float32, "eager")
    theirs = [
        errors(reference_logits(variant, folder, tokens, torch.bfloat16, attention), truth)
        for attention in ("eager", "sdpa")
    ]
    decoder = load_decoder(folder, ModelConfig.load(folder), device, torch.bfloat16)
    for name, run in (("dense", dense_logits), ("paged", paged_logits)):
        ours = errors(run(decoder, tokens), truth)
        ratios = {what: ours[what] / max(their[what] for their in theirs) for what in MARGINS}
        shares = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
        print(f"{variant:14} {name}: mean error {ours['mean']:.4f}; against transformers {shares}")
        assert all(ratio <= MARGINS[what] for what, ratio in ratios.items()), shares
