"""Jobs side by side, and what is judged of their models."""

import sys
from pathlib import Path

import pytest

from benchmarks.recovery import KINDS, Job, jobs_of, side_by_side, verdict

SHOW = "import os; print('gpu', os.environ['CUDA_VISIBLE_DEVICES'])"


def job(name: str, code: str) -> Job:
    return Job(name, (sys.executable, "-c", code))


def test_each_job_has_a_gpu_a_log_and_an_end(tmp_path: Path) -> None:
    jobs = [job(str(n), SHOW) for n in range(3)]
    jobs += [job("wrong", "raise SystemExit(3)"), job("late", "import time; time.sleep(60)")]
    side_by_side(jobs, ["5", "7"], 8.0, tmp_path)
    logs = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert len(logs) == 5
    assert {logs[str(n)].split()[1] for n in range(3)} <= {"5", "7"}
    assert "done after" in logs["0"] and "status 3" in logs["wrong"] and "over" in logs["late"]


def test_what_has_no_time_is_not_begun(tmp_path: Path) -> None:
    side_by_side([job("slow", "import time; time.sleep(9)"), job("next", SHOW)], [""], 1, tmp_path)
    assert [path.stem for path in tmp_path.iterdir()] == ["slow"]


def test_commands_are_those_of_the_route(tmp_path: Path) -> None:
    """Without text they end in its error, not in one of usage."""
    jobs = jobs_of(tmp_path / "none", tmp_path, 2)
    assert [each.name for each in jobs] == [
        *(f"recover-{name}" for name in KINDS),
        *(f"control-{name}" for name in KINDS),
    ]
    assert sum("--teacher" in part for part in jobs[0].command) == 2
    side_by_side([jobs[0], jobs[-1]], ["", ""], 120, tmp_path)
    for each in (jobs[0], jobs[-1]):
        told = (tmp_path / f"{each.name}.log").read_text()
        assert "training.npz" in told.replace("\n", "") and "Usage" not in told


def scores(**perplexities: float) -> dict[str, dict[str, float]]:
    sizes = {"overall": 9000, "de": 5000, "fr": 3000, "eo": 100}
    return {
        name: {"tokens": sizes[name], "perplexity": value} for name, value in perplexities.items()
    }


def test_the_best_dense_model_judges() -> None:
    recovered = scores(overall=10.2, de=9.9, fr=12.0, eo=90.0)
    dense = {
        "original": scores(overall=11.0, de=8.0, fr=8.0, eo=9.0),
        "control": scores(overall=10.0, de=9.0, fr=12.0, eo=9.0),
    }
    row = verdict("m", recovered, scores(overall=50.0), dense)
    assert row["best_dense"] == "control" and row["ratio"] == pytest.approx(1.02)
    assert row["worst_language"] == "de" and "eo" not in row["ratio_by_language"]
    assert row["ratio_by_language"]["de"] == pytest.approx(1.1)
