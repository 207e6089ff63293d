"""Parts of a curve that were measured apart."""

import json
from pathlib import Path

import pytest

from benchmarks.compression_curve import WAYS, Way, joined


def part(folder: Path, number: int, ways: list[Way], device: str = "card") -> None:
    points = [{"pattern": way.pattern, "sparsity": 1 - way.kept, "bits": way.bits} for way in ways]
    figures = {"model": "m", "steps": 3, "points": points, "made": {"device": device}}
    (folder / f"compression_curve_{number}.json").write_text(json.dumps(figures))


def test_they_are_put_in_order(tmp_path: Path) -> None:
    for number in range(3):
        part(tmp_path, number, list(WAYS[number::3]))
    found = joined(tmp_path)
    assert [(own["pattern"], own["bits"]) for own in found["points"]] == [
        (way.pattern, way.bits) for way in WAYS
    ]
    assert found["made_on"] == "card"


def test_parts_of_unequal_runs_are_refused(tmp_path: Path) -> None:
    part(tmp_path, 0, [WAYS[0]])
    part(tmp_path, 1, [WAYS[1]], device="another")
    with pytest.raises(SystemExit, match="2 different runs"):
        joined(tmp_path)
