"""What has no room is refused in words, before anything is loaded where that can be known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine, Knobs, loading
from conclave.worker.errors import ConfigError
from conclave.worker.running.caches import PlainCaches
from conclave.worker.running.host_blocks import HostBlocks

Checkpoint = Callable[[int | str], Path]
SMALL: dict[str, Any] = {
    **{"max_context": 96, "block_size": 4, "threads": 1, "device": "cpu"},
    **{"max_sequences": 4, "max_step_tokens": 32},
}


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights must not be read."""

    def load(*_: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(loading, "load_decoder", load)


@pytest.mark.parametrize(
    ("settings", "free", "message"),
    [
        ({"kv_tokens": 2**30}, None, r"cache takes \S+ GiB and .* free: lower kv_tokens"),
        ({"kv_memory_gib": 0.01}, 10**6, "GiB free: lower kv_memory_gib"),
        ({"knobs": Knobs(memory_budget=1)}, 10**6, r"GiB free: lower knobs\.memory_budget"),
        ({"kv_memory_gib": 1e-6}, None, "the KV cache has room for 0 tokens, but max_context 96"),
        ({"kv_host_gib": 1e-7}, None, "kv_host_gib 1e-07 holds no block .* give at least"),
        (
            {"kv_host_gib": 1e-7, "knobs": Knobs(memory_budget=1)},
            *(None, "kv_host_gib 1e-07 holds no block"),
        ),
    ],
)
def test_a_cache_without_room_is_refused_at_once(
    settings: dict[str, Any],
    free: int | None,
    message: str,
    tiny_checkpoint: Checkpoint,
    nothing_loaded: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if free is not None:
        monkeypatch.setattr(loading, "host_memory", lambda: free)
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_checkpoint("1"), **SMALL, **settings)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"kv_tokens": 960}, "lower kv_tokens, or end"),
        ({"kv_memory_gib": 0.01}, "lower kv_memory_gib, or end"),
        ({"knobs": Knobs(memory_budget=1)}, "lower knobs.memory_budget, or end"),
        ({}, "give knobs.memory_budget, so that"),
    ],
)
def test_memory_that_a_neighbour_takes_is_told(
    settings: dict[str, Any],
    remedy: str,
    tiny_checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def empty(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(PlainCaches, "empty", empty)
    with pytest.raises(ConfigError, match=f"has no room: .* allocate 20.00 GiB: {remedy}"):
        Engine(tiny_checkpoint("1"), **SMALL, **settings)


def test_what_was_locked_is_let_go_if_loading_fails_at_its_end(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go: list[HostBlocks] = []
    usual = HostBlocks.close

    def close(own: HostBlocks) -> None:
        let_go.append(own)
        usual(own)

    monkeypatch.setattr(HostBlocks, "close", close)

    def fail(folder: Path) -> str:
        raise OSError(f"{folder} has gone")

    monkeypatch.setattr(loading, "fingerprint", fail)
    with pytest.raises(OSError, match="has gone"):
        Engine(tiny_checkpoint(1), kv_tokens=96, kv_host_gib=0.01, **SMALL)
    assert len(let_go) == 1
