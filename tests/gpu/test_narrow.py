"""The engine on a card: attention by kernels, over plain pages and over narrow ones."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine, Knobs
from conclave.worker.running.caches import NarrowCaches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TinyCheckpoint = Callable[[int | str], Path]
PROMPTS = [[(17 * row + 5 * place) % 290 + 3 for place in range(20 + 11 * row)] for row in range(6)]
SETTINGS: dict[str, Any] = {"max_context": 160, "kv_tokens": 4096, "block_size": 16}


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> TinyCheckpoint:
    """tests/worker/conftest.py, which pytest shares with its own folder only."""
    path = Path(__file__).parents[1] / "worker" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_checkpoints", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, Path] = {}

    def folder_of(variant: int | str) -> Path:
        name = str(variant)
        if name not in made:
            made[name] = module.write_checkpoint(name, tmp_path / name)
        return made[name]

    return folder_of


def scores(folder: Path, **settings: Any) -> tuple[torch.Tensor, Engine]:
    """Log-probabilities of all prompts' tokens, asked at once, in chunks."""
    with Engine(folder, max_step_tokens=48, **SETTINGS, **settings) as engine:
        streams = [
            engine.stream(prompt, max_tokens=1, temperature=0.0, prompt_logprobs=0)
            for prompt in PROMPTS
        ]
        records = [record for stream in streams for record in stream.result().prompt_tokens]
    found = [record.logprob for record in records if record.logprob is not None]
    return torch.tensor(found, dtype=torch.float64), engine


@pytest.mark.parametrize("variant", [1, 4, 6, 8, 10])
def test_as_near_to_float32_as_torch_is(tiny_checkpoint: TinyCheckpoint, variant: int) -> None:
    """Kernels are as far from float32 as bfloat16 is; 1 % of keys and values is a little more."""
    folder = tiny_checkpoint(variant)
    exact, _ = scores(folder, device="cpu")
    plain, _ = scores(folder)
    off = float((plain - exact).abs().mean())
    assert off < (0.5 if variant == 6 else 0.15)  # experts that change places
    for error, times in ((0.01, 1.5), (0.005, 1.3)):
        found, engine = scores(folder, knobs=Knobs(max_error=error))
        assert float((found - exact).abs().mean()) < times * off + 0.01
        caches = engine.model.runner.caches
        assert isinstance(caches, NarrowCaches)
        layers = [layer for use in caches.use() for layer in use.layers]
        assert all(layer.heads and layer.largest <= error for layer in layers)


@pytest.mark.parametrize("error", [None, 0.01, 0.005])
def test_answers_do_not_depend_on_company(
    tiny_checkpoint: TinyCheckpoint, error: float | None
) -> None:
    """Greedy, the same batch twice; and no row of a pool is lost."""
    folder, knobs = tiny_checkpoint(1), Knobs(max_error=error)
    asked: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    found = []
    for _ in range(2):
        with Engine(folder, knobs=knobs, prefix_cache=False, **SETTINGS) as engine:
            streams = [engine.stream(prompt, **asked) for prompt in PROMPTS]
            found.append([stream.result().token_ids for stream in streams])
        if error is not None:
            engine.model.runner.renew(engine._loop.scheduler.blocks.take_renewed())
            caches = engine.model.runner.caches
            assert isinstance(caches, NarrowCaches)
            assert [use.used for use in caches.use()] == [0, 0]
    assert [len(answer) for answer in found[0]] == [24] * len(PROMPTS)
    same = sum(a == b for a, b in zip(*found, strict=True))
    assert same >= len(PROMPTS) - 1  # which step a prompt joins depends on timing
