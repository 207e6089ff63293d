"""What `benchmarks.kernels` does around its measurements, with a clock that needs no GPU."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import contestants, rows
from benchmarks.clock import Time, launches_over
from benchmarks.contestants import CUBLAS, DENSE4, INT8, SPARSE, Contestant, cublas, int8, ours
from benchmarks.experts import choices
from benchmarks.measurements import rows_of
from benchmarks.shapes import LINEARS, STACKS, group_of
from conclave.kernels.formats import SHIPPED, Format


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "copies_past_cache", lambda nbytes: 2)


def clock(launch: Callable[[int], object], launches: int) -> Time:
    for index in range(launches):
        launch(index)
    return Time(10.0, 8.0, 16.0)


def weight() -> Tensor:
    return torch.randn(128, 256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "build"),
    [(SPARSE, ours(SPARSE)), (DENSE4, ours(DENSE4)), (CUBLAS, cublas), (INT8, int8)],
)
def test_right_answers_get_a_time(kind: str, build: contestants.Builder) -> None:
    (row,) = rows_of(kind, build, weight(), "128x256", [32], 1000.0, clock)
    assert row["us"] == 10.0 and row["error"] <= 3e-3
    assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 1000)


def test_wrong_answers_get_none() -> None:
    def wrong(weight: Tensor) -> Iterator[Contestant]:
        for factor in (1.01, math.nan):
            yield Contestant(
                "x",
                "",
                1,
                weight,
                1,
                lambda x, _, by=factor: x @ weight.T * by,  # type: ignore[misc]
            )

    for row in rows_of("x", wrong, weight(), "128x256", [1, 2], 1000.0, clock):
        assert row["us"] is None and row["note"].startswith("WrongAnswer: relative error")


def test_who_is_missing_or_fails_says_so() -> None:
    def missing(weight: Tensor) -> Iterator[Contestant]:
        raise ImportError("no such package")
        yield

    def failing(weight: Tensor) -> Iterator[Contestant]:
        raise RuntimeError("too old a card\nand more")
        yield

    notes = [
        row["note"]
        for build in (missing, failing)
        for row in rows_of("x", build, weight(), "128x256", [1], 1000.0, clock)
    ]
    assert notes == ["absent", "RuntimeError: too old a card"]


def test_one_token_takes_the_faster_way() -> None:
    times = iter((Time(9.0, 9.0, 9.0), Time(7.0, 7.0, 7.0)))
    (row,) = rows_of(CUBLAS, cublas, weight(), "a", [1], 1.0, lambda *_: next(times))
    assert (row["us"], row["note"]) == (7.0, "mv")


def test_ratios(tmp_path: Path) -> None:
    found = [
        rows.measured(CUBLAS, "a", 1, Time(40.0, 36.0, 50.0), 1, 1.0),
        rows.measured(SPARSE, "a", 1, Time(10.0, 9.0, 12.0), 20_000, 4.0),
        rows.measured(SPARSE, "a", 8, Time(10.0, 9.0, 12.0), 1, 1.0),
        rows.refused(DENSE4, "a", 1, "absent"),
    ]
    rows.add_ratios(found)
    assert [row["vs_cublas"] for row in found] == [1.0, 4.0, None, None]
    assert (found[1]["gb_per_s"], found[1]["of_copy"]) == (2.0, 0.5)
    assert rows.ratio(found[0], found[1]) == (4.0, (3.0, 50 / 9))
    assert rows.find(found, SPARSE, "a", 1) is found[1]
    assert rows.find(found, DENSE4, "a", 1) is None
    assert rows.pivot(found)[1] == {"shape": "a", "kind": SPARSE, "1": 4.0, "8": ""}
    assert rows.pivot(found)[2]["1"] == "absent"
    rows.draw(found, "a", "a title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_every_shape_has_a_compiled_format() -> None:
    for shape in (*LINEARS, *STACKS):
        format = Format.parse(f"5:16-int4-g{group_of(shape.columns)}")
        assert shape.columns % format.group == 0 and format in SHIPPED


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_token_has_eight_different_experts(tokens: int) -> None:
    for own in choices(tokens, 128, "cpu"):
        assert own.dtype == torch.int32 and len(own) == 8 * tokens
        assert own.bincount().max() <= tokens and bool((own.diff() >= 0).all())


def test_a_graph_takes_each_copy_equally_often() -> None:
    assert [launches_over(copies) for copies in (3, 5, 12, 62)] == [12, 15, 12, 62]
