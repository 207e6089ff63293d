"""The benchmark of lossless codes runs, and refuses speeds of what is wrong."""

import pytest
import torch

from benchmarks import lossless


def test_tiny_weights_come_back() -> None:
    told = lossless.measure(lossless.TINY, dry=True)["decoded"]
    assert [row["kind"] for row in told] == ["5:16-int4-g128", "bfloat16"] * 2
    assert all(row["of_plain_bytes"] == 0.825 for row in told[::2])


def test_what_is_wrong_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "decode", lambda code, coded, out: torch.Tensor.zero_(out))
    with pytest.raises(SystemExit, match="no speed is told"):
        lossless.measure(lossless.TINY, dry=True)
