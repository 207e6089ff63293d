"""`conclave plan`: what it tells and draws, and what it refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conclave.worker.compress.__main__ import app
from conclave.worker.memory import command

SHAPE = ("--shape", "31b", "--memory-budget", "16")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_tells_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    options = ("--weight-bits", "4", "--memory-budget", "16", "--max-sequences", "8")
    trace = tmp_path / "trace.json"
    files = ("--plot", str(picture), "--trace", str(trace))
    result = run("--shape", "31b", *options, "--link", "50", "--json", *files)
    assert result.exit_code == 0 and picture.stat().st_size > 1000
    told = json.loads(result.stdout)
    lanes = {event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"compute", "copies", "waiting"} <= lanes
    for step in told["steps"]:
        assert step["compute_seconds"] + step["waited_seconds"] >= 0.999 * step["seconds"]
    assert told["copied_bytes"] > 0 and len(told["streamed"]) > told["slots"] == 3
    first = told["steps"][0]
    assert first["tokens"] == 1 and first["limit"] == "link"
    assert first["transfer_seconds"] == pytest.approx(told["copied_bytes"] / 50e9)
    sparse = ("--shape", "31b", "--weight-bits", "4", "--sparsity", "0.68", "--memory-budget", "11")
    told = json.loads(run(*sparse, "--json", "--plot", str(picture), "--trace", str(trace)).stdout)
    assert told["coded"] and 0 < told["working_bytes"] < told["slot_bytes"]
    assert told["steps"][0]["decode_seconds"] > 0
    lanes = {event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "decoding" in lanes
    shown = " ".join(run(*sparse).stdout.split())
    assert "in a shorter code" in shown and "decoded into" in shown
    assert not json.loads(run(*sparse, "--no-stream-coded", "--json").stdout)["coded"]
    experts = ("--shape", "26b", "--weight-bits", "4", "--memory-budget", "8")
    told = json.loads(run(*experts, "--json", "--plot", str(picture)).stdout)
    assert told["experts"]["slots"] > 128 and not told["streamed"]
    assert 0.6 < told["experts"]["assumed_hit_rate"] < 1
    shown = " ".join(run(*experts).stdout.split())
    assert f"{told['experts']['slots']} slots for" in shown and "assumed:" in shown
    shown = " ".join(run("--shape", "31b", *options, "--tokens", "2048").stdout.split())
    assert "3 slots for" in shown and "as long as copying at" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-budget", "8"], "give a checkpoint or --shape"),
        (["--shape", "70b", "--memory-budget", "8"], "choose one of 31b, 26b"),
        (["--shape", "31b", "--memory-budget", "4"], "the least for this model is"),
        (["--shape", "31b", "--memory-budget", "much"], "--memory-budget: give GiB"),
        (["--shape", "31b", "--memory-budget", "8", "--weight-bits", "5"], "--weight-bits: choose"),
        ([*SHAPE, "--link", "0"], "--link is 0; give 0.001 to 1e+06 GB/s"),
        ([*SHAPE, "--link", "-3"], "--link is -3; give"),
        ([*SHAPE, "--memory-rate", "nan"], "--memory-rate is nan; give 0.001 to 1e+06 GB/s"),
        ([*SHAPE, "--compute-rate", "inf"], "--compute-rate is inf; give 0.001 to 1e+06 TFLOP/s"),
        ([*SHAPE, "--link", "1e-300"], "--link is 1e-300; give"),
        ([*SHAPE, "--max-step-tokens", "1" + 400 * "0"], "--max-step-tokens: Input should be less"),
        ([*SHAPE, "--plot", "nowhere/plan.png"], "--plot cannot write nowhere/plan.png (No such"),
        ([*SHAPE, "--plot", "plan.xyz"], "--plot draws no 'xyz'; name a file in png, svg, pdf"),
        ([*SHAPE, "--plot", "."], "--plot cannot write . (Is a directory); name a file"),
        ([*SHAPE, "--trace", "nowhere/t.json"], "--trace cannot write nowhere/t.json (No such"),
        ([*SHAPE, "."], "give a checkpoint or --shape"),
        ([".", "--memory-budget", "8"], "config.json does not exist: name a checkpoint's folder"),
        (["file", "--memory-budget", "8"], "file/config.json does not exist: name a checkpoint"),
    ],
)
def test_what_cannot_be_planned_is_said(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = run(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert message in " ".join(result.stderr.split())
    assert not result.stdout and os.listdir() == ["file"]


def test_tokens_beyond_sense_are_refused() -> None:
    result = run(*SHAPE, "--tokens", "1" + 400 * "0")
    assert result.exit_code == 2 and "--tokens" in result.stderr


ROOMY = ("--shape", "31b", "--weight-bits", "4", "--memory-budget", "64")


def test_what_has_room_is_told_too(tmp_path: Path) -> None:
    picture = tmp_path / "plan"
    result = run(*ROOMY, "--json", "--plot", str(picture))
    assert result.exit_code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    told = strict(result.stdout)
    assert told["balance_tokens"] is None and not told["streamed"]
    assert all(step["waited_seconds"] == step["transfer_seconds"] == 0 for step in told["steps"])
    shown = " ".join(run(*ROOMY).stdout.split())
    assert "60 layers that stay" in shown and "nothing is streamed" in shown
    assert "slots for" not in shown and "as long as copying" not in shown


@pytest.mark.parametrize("rate", ["0.001", "1e6"])
@pytest.mark.parametrize("option", ["--link", "--memory-rate", "--compute-rate"])
def test_the_furthest_rates_are_told(option: str, rate: str, tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    result = run(*SHAPE, option, rate, "--json", "--plot", str(picture))
    assert result.exit_code == 0 and picture.read_text().startswith("<?xml")
    strict(result.stdout)


def test_rates_are_told_as_they_are() -> None:
    told = strict(run(*SHAPE, "--link", "0.25", "--json").stdout)
    assert told["rates"]["link"] == 0.25e9 and told["rates"]["given"] == ["link"]
    assert told["balance_tokens"] is None  # no step that is looked at computes so long
    shown = " ".join(run(*SHAPE, "--link", "0.25", "--compute-rate", "1234.4").stdout.split())
    assert "link 0.25 GB/s as given" in shown and "products 1234 TFLOP/s as given" in shown
    assert "e+0" not in shown


def test_all_rates_given_need_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "memory_of", lambda device: 80 << 30)
    rates = ("--link", "50", "--memory-rate", "2000", "--compute-rate", "600")
    told = strict(run(*SHAPE, *rates, "--json").stdout)
    assert told["rates"]["measured"] is False


def test_steps_are_told_once_and_in_their_order() -> None:
    result = run(*SHAPE, "--json", "--tokens", "8", "--tokens", "1", "--tokens", "8")
    assert [step["tokens"] for step in strict(result.stdout)["steps"]] == [1, 8]


def strict(text: str) -> Any:
    """JSON as others read it, which has no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)
