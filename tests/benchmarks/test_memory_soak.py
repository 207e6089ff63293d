"""The soak of engines with too little memory: short, and how it judges."""

import pytest

from benchmarks import memory_soak


def test_a_short_one_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_soak, "EVERY", 0.5)
    figures = memory_soak.soak(6.0)
    assert figures["the same at the end"] and figures["wrong"] == figures["lost"] == 0
    assert all(told.get("right") for told in figures["requests"].values())
    assert figures["faults"] and figures["streamed_gb"] > 0 and figures["fetched_experts"] > 0
    assert figures["memory"]["resident"]["most_mib"] > 100


def test_growth_is_from_an_early_stretch_to_the_end() -> None:
    samples = [{"resident": 10.0 + number} for number in range(100)]
    told = memory_soak.judged(samples, "resident")
    assert told["growth_mib"] == 80.0 and told["most_mib"] == 109.0
