"""Engines that replay decode steps as CUDA graphs: the tokens of the same steps begun one by one.

Bit for bit, whatever lies where: plain and narrow caches, weights and experts that stay or come
while a step runs, coded or not; between prompts, after steps that failed, and where recording does.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine, Knobs, loading
from conclave.worker.errors import ConfigError, Unavailable
from conclave.worker.running.graphs import GraphRecorder
from conclave.worker.running.replayed import ReplayedDecode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODELS = Path(__file__).parents[2] / "examples" / "models"
FEW: dict[str, Any] = {
    **{"device": "cuda", "max_sequences": 6, "max_step_tokens": 64, "max_context": 1024},
    "prefix_cache": False,
}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
CASES = [
    ("debian-8m", {}, {}),
    ("debian-8m", {"max_error": 0.01}, {}),
    ("debian-moe-8m", {}, {}),
    ("debian-ple-8m", {"max_error": 0.05}, {}),
    ("debian-8m-dense", {"memory_budget": 0, "prefetch": 2}, {"stream_coded": False}),
    ("debian-8m-dense", {"memory_budget": 0, "prefetch": 2}, {"stream_coded": True}),
    ("debian-8m-dense", {"memory_budget": 0, "prefetch": 0}, {"stream_coded": False}),
    ("debian-moe-8m", {"memory_budget": 0, "prefetch": 1}, {}),
]


def begun(_: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """In place of `GraphRecorder`: padded steps, begun kernel by kernel each time."""
    return lambda run: run


def engine(name: str, knobs: dict[str, Any], settings: dict[str, Any]) -> Engine:
    """The budget is the least where it is given as 0."""
    own = FEW | settings
    if knobs.get("memory_budget") == 0:
        with pytest.raises(ConfigError) as refused:
            Engine(MODELS / name, knobs=Knobs(**knobs | {"memory_budget": 1e-4}), **own)
        found = re.search(r"least for this model is (\S+) GiB", str(refused.value))
        assert found is not None
        knobs = knobs | {"memory_budget": float(found[1]) * 1.02}
    return Engine(MODELS / name, knobs=Knobs(**knobs), **own)


def answers(own: Engine) -> list[tuple[int, ...]]:
    """One after the other, across sizes of tables; several at once, whose steps depend on time, are
    asked for beside them."""
    alone = [
        tuple(own.generate([5 + n] * (60 + 220 * n), max_tokens=40, **GREEDY).token_ids)
        for n in range(3)
    ]
    together = [own.stream([5 + n] * (30 + 90 * n), max_tokens=30 + n, **GREEDY) for n in range(6)]
    assert [len(each.result().token_ids) for each in together] == [30 + n for n in range(6)]
    return [*alone, tuple(own.generate([7] * 500, max_tokens=40, **GREEDY).token_ids)]


def replayed(own: Engine) -> ReplayedDecode:
    found = own.model.runner._replayed
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "knobs", "settings"), CASES)
def test_tokens_are_those_of_steps_begun_one_by_one(
    name: str, knobs: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loading, "GraphRecorder", begun)
        with engine(name, knobs, settings) as plain:
            wanted = answers(plain)
    with engine(name, knobs, settings) as own:
        assert answers(own) == wanted
        assert replayed(own).recordings >= 3
        assert ("dense" in name) == (own.model.runner.stream is not None)
        with own.recorded() as recording:  # runs each layer by itself
            own.generate([9] * 20, max_tokens=5, **GREEDY)
        assert recording.timeline.spans
        assert answers(own) == wanted


@pytest.mark.parametrize(("name", "knobs", "settings"), [CASES[0], CASES[1], *CASES[4:6], CASES[7]])
def test_steps_that_fail_leave_the_next_ones_right(
    name: str, knobs: dict[str, Any], settings: dict[str, Any]
) -> None:
    """A prompt's step, in the middle of its layers; decoding goes on from recordings after it."""
    with engine(name, knobs, settings) as own:
        wanted = answers(own)

        def fail(*_: object) -> None:
            raise RuntimeError("on purpose")

        handle = own.model.runner.decoder.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(Unavailable, match="on purpose"):
            own.generate([5] * 30, max_tokens=3, **GREEDY)
        handle.remove()
        recordings = replayed(own).recordings
        assert answers(own) == wanted
        assert replayed(own).recordings >= recordings


@pytest.mark.parametrize(("name", "knobs", "settings"), [CASES[0], CASES[1], *CASES[4:6], CASES[7]])
def test_where_recording_fails_steps_run(
    name: str,
    knobs: dict[str, Any],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the middle of a step, whose layers have begun copies."""
    with monkeypatch.context() as patch:
        patch.setattr(loading, "GraphRecorder", begun)
        with engine(name, knobs, settings) as plain:
            wanted = answers(plain)
    with engine(name, knobs, settings) as own:

        def fail(*_: object) -> None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("on purpose")

        handle = own.model.runner.decoder.layers[3].register_forward_pre_hook(fail)
        assert answers(own) == wanted
        handle.remove()
        assert answers(own) == wanted
        assert replayed(own).recordings == 0
    assert caplog.text.count("not recorded any more: on purpose") == 1


def test_recordings_share_their_memory() -> None:
    """Of ten sizes together little more than of the largest."""
    device = torch.device("cuda")
    record = GraphRecorder(device)
    out = torch.empty(1, device=device)

    def step(size: int) -> Callable[[], None]:
        def run() -> None:
            out.copy_(torch.ones(size << 20, device=device).sum())

        return run

    for size in range(10, 0, -1):
        step(size)()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    replays = [record(step(size)) for size in range(10, 0, -1)]
    for size, replay in zip(range(10, 0, -1), replays, strict=True):
        replay()
        assert float(out) == size << 20
    assert torch.cuda.memory_reserved() - before <= 64 << 20


def test_an_engine_may_do_without() -> None:
    with Engine(MODELS / "debian-8m", **FEW, cuda_graphs=False) as own:
        assert own.model.runner._replayed is None
        assert len(own.generate("Once", max_tokens=5, **GREEDY).token_ids) == 5
