"""`benchmarks.experts_offload` on a CPU: the same answers from slots, and no figure at fault."""

from pathlib import Path

import pytest
import torch

from benchmarks import experts_offload
from benchmarks.expert_traces import drawn, foreseen, rates


def test_rows_answer_as_resident_ones() -> None:
    figures = experts_offload.measure(experts_offload.Length(4, 2, 6), dry=True)
    rows = {(row["batch"], row["way"]): row for row in figures["rows"]}
    assert set(rows) == {(b, way) for b in (1, 8) for way in ("resident", "on demand", "foreseen")}
    for batch in (1, 8):
        demand, ahead = rows[batch, "on demand"], rows[batch, "foreseen"]
        assert demand["same"] and ahead["same"]
        assert ahead["hit_rate"] > demand["hit_rate"] and ahead["precision"] > 0.5
    # From empty slots the cache does what the replay says.
    assert rows[1, "on demand"]["hit_rate"] == figures["policy"][0]["policy"]
    assert all(row["belady"] >= row["policy"] for row in figures["shipped"])


def test_traces_have_the_locality_that_is_told() -> None:
    trace, following = drawn(240, 4, 128, 8)
    assert all(len(own.unique()) == 8 for own in trace[7].flatten(0, 1))
    for share, published in ((0.38, 0.894), (0.63, 0.962)):
        found = rates(trace, 128, round(share * 4 * 128), 60)
        assert abs(found["lru"] - published) < 0.03
        assert found["lru"] < found["policy"] < found["belady"] and found["regret_points"] < 6
    guessed = foreseen(trace, following, 0.85)
    assert abs((guessed == trace).double().mean() - 0.85) < 0.01
    assert torch.equal(drawn(240, 4, 128, 8)[0], trace)
    slots = round(0.38 * 4 * 128)
    ahead = rates(trace, 128, slots, 60, guessed)
    assert ahead["foreseen"] > 0.92 and ahead["foreseen_precision"] > 0.6


@pytest.mark.parametrize("fault", [{"same": False}, {"peak_gib": 8.1}])
def test_rows_at_fault_give_no_figures(
    fault: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[str] = []
    monkeypatch.setattr(experts_offload, "write_result", lambda *_: tmp_path / "experts.json")
    monkeypatch.setattr(experts_offload, "write_headline", lambda name, *_: written.append(name))
    best = {"batch": 1, "way": "resident", "low": 200.0, "high": 220.0}
    right = best | {"way": "foreseen", "of_resident": 0.9, "same": True, "peak_gib": 7.9}
    experts_offload.save({"rows": [best, right | fault]}, None)
    assert not written
    experts_offload.save({"rows": [best, right]}, None)
    assert written == ["b26_8gib_fraction"]
