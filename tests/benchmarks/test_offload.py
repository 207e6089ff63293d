"""`benchmarks.offload` on a CPU: the same answers streamed, and no figure of rows at fault."""

from pathlib import Path

import pytest

from benchmarks import offload
from benchmarks.offload_settings import SETTINGS
from benchmarks.peak import GIB
from benchmarks.random_model import DTYPE
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.storage import storage_of
from conclave.worker.weights import blank_decoder


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


def test_the_ceiling_is_that_of_bytes_that_are_copied() -> None:
    """Of bfloat16 fewer than planned: the end of its code is without use."""
    config = ModelConfig.parse(shape_settings("31b", offload.TINY_LAYERS) | offload.TINY)
    storage = storage_of(blank_decoder(config), {}, DTYPE, packed=True)
    (setting,) = (each for each in SETTINGS if each.name == "bf8")
    planned = offload.residency_of(storage, setting, "coded", dry=True)
    for row in offload.measure(["bf8"], dry=True)["rows"]:
        assert row["same"] and row["streamed"].startswith(f"{len(planned.streamed)} of")
        copied = row["copied_gib"] * GIB
        assert 0.95 * planned.copied < copied < planned.copied
        assert row["copy_ms"] == pytest.approx(copied / 1e10 * 1e3)
        assert row["link_gb_per_s"] == pytest.approx(copied / row["ms"] / 1e6)


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
