"""What `benchmarks.attention` does around its measurements, on tiny layers and without a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import attenders, attention, records
from benchmarks.attenders import Layer, Way, own_int8, own_plain, pairs_seen
from benchmarks.attention import (
    FULL,
    HEADLINE,
    INDEX_COPY,
    INT8,
    PLAIN,
    SDPA,
    WRITE,
    best,
    decode_rows,
    decoding_shapes,
    prefill_rows,
    save,
    write_rows,
)
from benchmarks.clock import Time

LAYERS = (Layer("full", 4, 2, 64, None, 16), Layer("sliding", 4, 2, 32, 48))


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attenders, attention):
        monkeypatch.setattr(module, "copies_past_cache", lambda nbytes: 2)


def clock(launch: Callable[[int], object], launches: int) -> Time:
    for index in range(min(launches, 3)):
        launch(index)
    return Time(10.0, 8.0, 16.0)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_right_answers_get_a_time(layer: Layer, batch: int) -> None:
    rows = decode_rows(layer, 96, batch, 1000.0, clock, "cpu")
    assert [row["kind"] for row in rows] == [PLAIN, INT8, SDPA]
    for row in rows:
        assert row["us"] == 10.0 and row["error"] <= 2e-2 and row["vs_torch"] == 1.0
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 1000)
    numbers = batch * layer.keys(96) * layer.kv_heads * layer.head_dim
    assert rows[0]["gb_per_s"] == pytest.approx(4 * numbers / 10e3)
    assert rows[1]["gb_per_s"] < rows[0]["gb_per_s"] * (0.32 if layer.pairs else 0.62)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_prompts(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_torch(
        query: Tensor, key: Tensor, value: Tensor, offset: int, window: int | None, out: Tensor
    ) -> None:
        at = torch.arange(len(query))
        mask = (at <= at[:, None]) & (at > at[:, None] - (window or len(query)))
        how: dict[str, Any] = {"attn_mask": mask, "scale": 1.0, "enable_gqa": True}
        heads = query.transpose(0, 1)[None], key[None], value[None]
        out.copy_(F.scaled_dot_product_attention(*heads, **how)[0].transpose(0, 1))

    monkeypatch.setattr(attenders, "prefill", in_torch)
    own, torchs = prefill_rows(layer, 70, 1.0, clock, "cpu")
    assert own["us"] == torchs["us"] == 10.0
    seen = pairs_seen(70, layer.window)
    assert own["tflops"] == pytest.approx(4 * seen * layer.head_dim * 4 / 1e7)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("tokens", [1, 5])
def test_writing(layer: Layer, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(layer, tokens, clock, "cpu")
    assert [row["kind"] for row in rows] == [WRITE, INDEX_COPY]
    assert all(row["us"] == 10.0 and row["vs_torch"] == 1.0 for row in rows)
    monkeypatch.setattr(attention, "write", lambda *tensors: None)
    wrong, right = write_rows(layer, tokens, clock, "cpu")
    assert wrong["us"] is None and "WrongAnswer" in wrong["note"] and right["us"] == 10.0
    assert wrong.keys() == right.keys(), "rows of a table"


def test_pairs() -> None:
    for tokens, window in ((5, None), (5, 3), (3, 8), (1, 1)):
        counted = sum(min(place + 1, window or tokens) for place in range(tokens))
        assert pairs_seen(tokens, window) == counted


@pytest.mark.parametrize("make", [own_plain, own_int8])
def test_wrong_answers_get_none(make: Callable[..., Iterator[Way]]) -> None:
    def wrong(factor: float) -> Iterator[Way]:
        (way,) = make(LAYERS[0], 2, 64, "cpu")
        yield replace(way, attend=lambda copy: way.attend(copy) * factor)

    for factor in (1.01, torch.nan):
        row = best("x", partial(wrong, factor), clock)
        assert row["us"] is None and "WrongAnswer: relative error" in row["note"]


def test_who_fails_says_so() -> None:
    def failing() -> Iterator[Way]:
        raise RuntimeError("too little memory\nand more")
        yield

    assert best("x", failing, clock)["note"] == "RuntimeError: too little memory"


def test_shapes() -> None:
    shapes = list(decoding_shapes())
    assert HEADLINE in shapes and len(shapes) == len(set(shapes)) == 24


def test_headline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "HEADLINE", tmp_path / "headline.json")
    place = {"layer": FULL.name, "context": HEADLINE[1], "batch": HEADLINE[2]}
    times = {INT8: (10.0, 8.0, 16.0), SDPA: (40.0, 32.0, 48.0)}
    decode = [
        {**place, "kind": kind, **dict(zip(("us", "low", "high"), time, strict=True))}
        for kind, time in times.items()
    ]
    decode[0]["of_copy"] = 0.8
    written: dict[str, Any] = {}
    monkeypatch.setattr(
        "benchmarks.attention.write_headline", lambda name, *rest: written.update({name: rest})
    )
    save({"decode": decode}, None)
    assert written["attn512_copy_fraction"] == (0.8, "fraction", (0.5, 1.0))
    assert written["attn512_vs_sdpa"] == (4.0, "ratio", (2.0, 6.0))
