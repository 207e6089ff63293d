"""`benchmarks.offload` on a CPU: the same answers streamed, and no figure of rows at fault."""

from pathlib import Path

import pytest

from benchmarks import offload


def test_streamed_rows_answer_as_resident_ones() -> None:
    rows = offload.measure(["sparse8p"], dry=True)["rows"]
    assert [(row["way"], row["step"]) for row in rows] == [
        *(("prefetch", step) for step in ("1 x 1", "2 x 8")),
        *(("on demand", step) for step in ("1 x 1", "2 x 8")),
    ]
    assert all(row["same"] for row in rows)
    assert all(0 < int(row["streamed"].split()[0]) < 60 for row in rows)
    assert all(row["gain"] for row in rows if row["way"] == "on demand")


def test_tokens_are_decoded_from_codes() -> None:
    rows = offload.measure(["sparse8"], dry=True, plain=True)["rows"]
    assert [(row["way"], row["step"]) for row in rows] == [
        *(("coded", step) for step in ("1 x 1", "2 x 8")),
        *(("prefetch", step) for step in ("1 x 1", "2 x 8")),
    ]
    assert all(row["same"] and row["tables"] == "dense-int4-g64" for row in rows)
    assert rows[0]["copy_ms"] < rows[2]["copy_ms"]
    assert offload.ours(rows) == rows[:2] and offload.ours(rows[2:]) == rows[2:]


def test_prompts_run_from_codes() -> None:
    rows = offload.measure(["sparse8c"], dry=True)["rows"]
    assert {row["way"] for row in rows} == {"coded"} and all(row["same"] for row in rows)


@pytest.mark.parametrize("fault", [{"same": False}, {"peak_gib": 8.1}])
def test_rows_at_fault_give_no_figures(
    fault: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[str] = []
    monkeypatch.setattr(offload, "write_result", lambda *_: tmp_path / "offload.json")
    monkeypatch.setattr(offload, "write_headline", lambda name, *_: written.append(name))
    right = {
        **{"format": "5:16-int4-g128", "gib": 8, "way": "coded", "step": "1 x 1"},
        **{"ms": 2.0, "low": 1.9, "high": 2.1, "of_bound": 0.9, "link_gb_per_s": 50.0},
        **{"tokens_per_s": 500.0, "peak_gib": 7.9, "same": True},
    }
    offload.save({"rows": [right | fault]}, None)
    assert not written
    offload.save({"rows": [right]}, None)
    assert written == ["overlap_fraction", "b31_8gib_rate", "link_rate"]
