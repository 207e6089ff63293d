"""The command line against a live gateway of scripted workers."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conclave.orchestrator.cli import app
from conclave.orchestrator.cli.demo import shipped_fleet
from conclave.protos.generation_pb2 import Knobs, Precision

runner = CliRunner()


def invoke(*words: str, code: int = 0, text: str | None = None) -> Any:
    result = runner.invoke(app, words, input=text)
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def test_generate(live: Any) -> None:
    assert invoke("generate", "hi", "--address", live.address).stdout == "t0 t1 t2 \n"
    streamed = invoke("generate", "-", "--stream", "--address", live.address, text="from stdin")
    assert streamed.stdout == "t0 t1 t2 \n"
    assert live.rig.workers[1].asked[-1].prompt.text == "from stdin"


def test_every_sampling_option_arrives(live: Any) -> None:
    words = (
        "--max-tokens 7 --min-tokens 1 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 "
        "--presence-penalty 0.1 --frequency-penalty 0.2 --repetition-penalty 1.1 --seed 5 --n 2 "
        "--logit-bias 3=-1.5 --stop a --stop b --stop-token-id 9 --ignore-eos --include-stop "
        "--special-tokens --logprobs 2 --prompt-logprobs 1"
    ).split()
    invoke("generate", "hi", *words, "--address", live.address)
    sampling = live.rig.workers[0].asked[-1].sampling
    sent = {field.name for field, _ in sampling.ListFields()}
    assert sent == {field.name for field in sampling.DESCRIPTOR.fields}
    assert list(sampling.stop) == ["a", "b"] and sampling.logit_bias[3] == -1.5
    assert sampling.skip_special_tokens is False


def test_knobs(live: Any) -> None:
    words = ("generate", "hi", "--address", live.address, "--knobs")
    refused = " ".join(invoke(*words, "weight_bits=8,sparsity=0", code=1).stderr.split())
    assert "no worker for: knobs sparsity at most 0, weight_bits at least 8" in refused
    precision = Precision(sparsity=0.25, weight_bits=8, bits_per_weight=6.5)
    live.rig.workers[1].precision = precision
    live.call(live.rig.workers[1].set_serving(False))
    live.call(live.rig.workers[1].set_serving(True))
    registry = live.rig.gateway.registry
    live.until(lambda: registry.workers["w1"].precision is not None)
    for _ in range(2):
        invoke(*words, "weight_bits=8")
    assert [len(worker.asked) for worker in live.rig.workers] == [0, 2]
    assert live.rig.workers[1].asked[0].knobs == Knobs(weight_bits=8)
    shown = invoke("workers", "--address", live.address).stdout
    assert "8-bit values, 25.0% pruned, 6.5 bits a weight" in shown
    listed = json.loads(invoke("workers", "--json", "--address", live.address).stdout)
    assert [each["precision"] for each in listed] == [
        None,
        {"sparsity": 0.25, "weight_bits": 8, "bits_per_weight": 6.5, "kv_error": 0.0},
    ]


def test_chat(live: Any) -> None:
    invoke("generate", "hi", "--system", "be brief", "--thinking", "--address", live.address)
    chat = live.rig.workers[0].asked[-1].prompt.chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]
    assert chat.thinking


def test_json(live: Any) -> None:
    whole = json.loads(invoke("generate", "hi", "--json", "--address", live.address).stdout)
    assert whole["outputs"][0]["text"] == "t0 t1 t2 " and whole["worker"] == "w0"
    lines = invoke("generate", "hi", "--json", "--stream", "--address", live.address).stdout
    parsed = [json.loads(line) for line in lines.splitlines()]
    assert [line.get("text") for line in parsed[:-1]] == ["t0 ", "t1 ", "t2 "]
    assert parsed[-1]["usage"]["completion_tokens"] == 3
    workers = json.loads(invoke("workers", "--json", "--address", live.address).stdout)
    assert [worker["state"] for worker in workers] == ["serving", "serving"]


def test_tables(live: Any) -> None:
    table = invoke("workers", "--address", live.address).stdout
    assert live.rig.workers[0].address in table and "serving" in table
    table = invoke("score", "context", "one", "two", "--address", live.address).stdout
    assert "-1.000" in table and "'two'" in table


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["generate", "hi", "--worker", "nobody"], 1, "no worker for: names nobody"),
        (["generate", "hi", "--logit-bias", "x"], 2, "--logit-bias"),
        (["generate", "hi", "--label", "x"], 2, "--label: 'x' is not of the form KEY=VALUE"),
        (["generate", "hi", "--thinking"], 2, "need `messages`"),
        (["generate", "hi", "--knobs", "bits=8"], 2, "knobs.bits: is unknown; a request may have"),
        (["generate", "hi", "--knobs", "weight_bits=5"], 2, "choose one of 4, 8, 16"),
        (["generate", "hi", "--knobs", "weight_bits"], 2, "of the form KEY=VALUE"),
        (["generate", "hi", "--knobs", "memory_budget=4"], 2, "a worker's: set it in its"),
        (["generate", "hi", "--stream", "--n", "2"], 2, "--stream"),
    ],
)
def test_errors_are_one_line_on_stderr(
    live: Any, words: list[str], code: int, message: str
) -> None:
    result = invoke(*words, "--address", live.address, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_bad_requests_of_the_worker_are_told(live: Any, scripts: Any) -> None:
    live.script(scripts.invalid("sampling.top_p"))
    result = invoke("generate", "hi", "--address", live.address, code=2)
    assert "sampling.top_p: is bad" in result.stderr


def test_no_gateway() -> None:
    result = invoke("workers", "--address", "127.0.0.1:1", code=1)
    assert "127.0.0.1:1" in result.stderr


def test_serve_refuses_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("workers: [{name: a, engin: {}}]")
    result = invoke("serve", "--fleet", str(path), code=2)
    assert "did you mean `engine`?" in result.stderr


@pytest.mark.parametrize("command", ["serve", "stop"])
def test_no_ray_cluster_is_told_at_once(command: str) -> None:
    fleet = Path(__file__).resolve().parents[2] / "fleet.yaml"
    result = invoke(command, "--fleet", str(fleet), "--address", "127.0.0.1:1", code=2)
    assert "no Ray cluster answers at 127.0.0.1:1" in result.stderr


def test_the_demo_finds_its_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_fleet() == Path(__file__).resolve().parents[2] / "fleet.yaml"


def test_help_names_every_command() -> None:
    text = invoke("--help").stdout
    for command in ("serve", "stop", "workers", "generate", "score", "demo"):
        assert command in text
