"""The benchmark of decoding compares tokens before it tells a speed."""

import pytest
import torch

from benchmarks import decode
from conclave.worker.running.batch import Chunk
from conclave.worker.running.replayed import Outcome, ReplayedDecode


def test_both_ways_give_the_same_tokens() -> None:
    rows = decode.measure(dry=True)["rows"]
    assert [(row["model"], row["batch"]) for row in rows] == [
        (name, batch) for name, _, batches in decode.CASES for batch in batches
    ]


def test_other_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = ReplayedDecode.__call__, iter(range(10**6))

    def wrong(own: ReplayedDecode, chunks: list[Chunk], limits: list[float]) -> Outcome:
        found = plain(own, chunks, limits)
        shifted = found.logits + torch.rand(found.logits.shape[1]) * (next(calls) > 5)
        return Outcome(shifted, found.marks)

    monkeypatch.setattr(ReplayedDecode, "__call__", wrong)
    with pytest.raises(AssertionError, match="same tokens"):
        decode.measure(dry=True)
