"""How programs are shared out: within the workspace, nobody idle, the measured table first."""

import pytest
import torch

from conclave.kernels import tuning
from conclave.kernels.tuning import gemv_plan, gemv_rule, matmul_rule
from conclave.kernels.workspace import COUNTERS, PARTIALS


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("tiles", [1, 7, 168, 2048, COUNTERS])
@pytest.mark.parametrize("pieces", [1, 3, 84, 336])
@pytest.mark.parametrize("copies", [1, 8, 64])
def test_few_tokens_stay_within_the_workspace(
    tokens: int, tiles: int, pieces: int, copies: int
) -> None:
    warps, splits, _ = gemv_rule(tiles, pieces, tokens, copies)
    assert warps in (1, 2, 4) and 1 <= splits <= pieces
    if splits > 1:
        assert tiles * copies <= COUNTERS
        assert splits * tiles * 128 * tokens * copies <= PARTIALS


@pytest.mark.parametrize(("tokens", "fit"), [(8, 5), (16, 4), (32, 3), (64, 2), (128, 1)])
@pytest.mark.parametrize(("tiles", "chunks"), [(1, 1), (42, 168), (168, 42), (COUNTERS, 42)])
@pytest.mark.parametrize("blocks", [1, 2, 32])
def test_every_split_has_work(tokens: int, fit: int, tiles: int, chunks: int, blocks: int) -> None:
    splits = matmul_rule(132, tiles, chunks, blocks, tokens, fit)
    each = -(-chunks // splits)
    assert 1 <= splits <= chunks and (splits - 1) * each < chunks
    if splits > 1:
        assert splits * tiles * 128 * tokens * blocks <= PARTIALS


@pytest.mark.parametrize(
    ("tokens", "fit", "measured"),
    [
        *[(8, 5, (6, 14, 3)), (8, 4, (3, 12, 3)), (16, 4, (3, 12, None))],
        *[(32, 3, (2, 9, 1)), (64, 2, (3, 6, 1))],
    ],
)
def test_the_rule_finds_the_fastest_splits(
    tokens: int, fit: int, measured: tuple[int | None, ...]
) -> None:
    """Those of an H200, of 5:16 int4 and of dense int4."""
    shapes = ((168, 42), (42, 168), (336, 42))
    for (tiles, chunks), fastest in zip(shapes, measured, strict=True):
        assert fastest in (None, matmul_rule(132, tiles, chunks, 1, tokens, fit))


def test_what_was_measured_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_card", lambda device: ("some card", 10))
    monkeypatch.setattr(tuning, "_table", lambda: {"some card": {"gemv 1 5x84x1": [4, 9, 2]}})
    gemv_plan.cache_clear()
    try:
        assert gemv_plan(torch.device("cpu"), 5, 84, 1, 1) == (4, 9, 2)
        assert gemv_plan(torch.device("cpu"), 6, 84, 1, 1) == gemv_rule(6, 84, 1, 1)
    finally:
        gemv_plan.cache_clear()
