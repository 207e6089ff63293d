"""The benchmark of prompts draws rows that fail as often as told, and compares before it times."""

import pytest
import torch

from benchmarks import prompts
from conclave.kernels.integer.reference import rounded, whole_numbers


def test_every_case_is_compared() -> None:
    figures = prompts.measure(torch.device("cpu"), dry=True)
    found = [(row["failing"], row["where"]) for row in figures["rows"]]
    assert found == list(prompts.CASES)


@pytest.mark.parametrize(("share", "where"), prompts.CASES)
def test_rows_fail_as_often_as_told(share: float, where: str) -> None:
    x = prompts.drawn(300, 5376, share, where, torch.device("cpu"))
    whole, _ = whole_numbers(x, prompts.ERROR)
    beyond = whole.abs() > 127
    assert int(beyond.any(1).sum()) == round(share * 300)
    blocks = beyond.view(300, -1, 128).any(-1).any(0)
    if where == prompts.CHANNELS:
        assert int(blocks.sum()) == 3
    elif share > 0.1:
        assert bool(blocks.all())


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, max_error: float) -> torch.Tensor:
        return 0.97 * rounded(x, max_error)

    monkeypatch.setattr("conclave.kernels.linear.rounded", wrong)
    with pytest.raises(AssertionError, match="off"):
        prompts.measure(torch.device("cpu"), dry=True)
