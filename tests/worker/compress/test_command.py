"""`conclave compress` as a user meets it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from conclave.worker import Engine
from conclave.worker.compress.__main__ import app

SMALL = ("--sequences", "4", "--length", "16", "--device", "cpu", "--format", "8:16-bf16")


def run(*arguments: str | Path, command: str = "compress") -> Result:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"paragraph {number} of many" for number in range(40)))
    return path


def test_compressed_and_run(text: Path, text_checkpoint: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    done = run(text_checkpoint, made, "--text", text, *SMALL, "--json", "--keep", "layers.0.*")
    assert done.exit_code == 0, done.output
    weights = json.loads(done.stdout)["weights"]
    assert weights == json.loads((made / "conclave.json").read_text())["about"]["weights"]
    assert {each["format"] for each in weights[:4]} == {"as it was"}
    assert {each["format"] for each in weights[4:]} == {"8:16-bf16"}
    with Engine(made, max_context=96, kv_tokens=1024, block_size=4, threads=1) as engine:
        assert len(engine.generate("hello", max_tokens=4, ignore_eos=True).token_ids) == 4
    again = run(text_checkpoint, made, "--text", text, *SMALL)
    assert again.exit_code == 1 and "finished checkpoint" in again.output


def test_an_adapter_is_merged(text: Path, text_checkpoint: Path, tmp_path: Path) -> None:
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": False}
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 64)}
    tensors[f"{module}.lora_B.weight"] = torch.ones(64, 2)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    options = ("--text", text, *SMALL, "--adapter", tmp_path)
    done = run(text_checkpoint, tmp_path / "made", *options, "--sparsity", "0.6")
    assert done.exit_code == 0, done.output
    about = json.loads((tmp_path / "made" / "conclave.json").read_text())["about"]
    assert len(about["adapter"]["fingerprint"]) == 64
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    refused = run(text_checkpoint, tmp_path / "other", *options)
    assert refused.exit_code == 1 and "use_dora is set" in " ".join(refused.output.split())


def test_in_the_pattern_of_another(text: Path, text_checkpoint: Path, tmp_path: Path) -> None:
    other, made = tmp_path / "other", tmp_path / "made"
    assert run(text_checkpoint, other, "--text", text, *SMALL).exit_code == 0
    options = ("--text", text, *SMALL[:-2], "--like", other)
    done = run(text_checkpoint, made, *options, "--mode", "magnitude")
    assert done.exit_code == 0, done.output
    theirs, ours = (json.loads((each / "conclave.json").read_text()) for each in (other, made))
    assert ours["weights"] == theirs["weights"] and len(ours["about"]["like"]) == 64
    for option in (("--format", "5:16-bf16"), ("--sparsity", "0.6"), ("--keep", "layers.0.*")):
        refused = run(text_checkpoint, tmp_path / "no", *options, *option)
        assert refused.exit_code == 1
        assert f"leave {option[0]} out" in " ".join(refused.output.split())


def test_sparse_on_average(text: Path, text_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--text", text, *SMALL, "--sparsity", "0.65", "--json")
    done = run(text_checkpoint, tmp_path / "made", *options)
    assert done.exit_code == 0, done.output
    formats = {each["format"] for each in json.loads(done.stdout)["weights"]}
    assert len(formats) > 1 and formats <= {f"{kept}:16-bf16" for kept in (4, 5, 6, 8)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "5:16"), "5:16-int4-g128"),
        (("--mode", "luck"), "magnitude, wanda, sparsegpt"),
        (("--keep", "layers.*=int3"), "int3"),
        (("--sequences", "100000"), "Give more text"),
        (("--sparsity", "0.9"), "out of reach"),
    ],
)
def test_wrong_options_are_told(
    arguments: tuple[str, str], message: str, text: Path, text_checkpoint: Path, tmp_path: Path
) -> None:
    done = run(text_checkpoint, tmp_path / "made", "--text", text, *SMALL, *arguments)
    assert done.exit_code == 1 and message in " ".join(done.output.split())
    assert not (tmp_path / "made").exists()


def test_no_checkpoint_is_told(text: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", tmp_path / "made", "--text", text, *SMALL)
    assert done.exit_code == 1 and "error:" in done.output


def test_evaluated(text: Path, text_checkpoint: Path, tmp_path: Path) -> None:
    made, out = tmp_path / "made", tmp_path / "report"
    assert run(text_checkpoint, made, "--text", text, *SMALL).exit_code == 0
    options = ("--original", text_checkpoint, "--device", "cpu", "--out", out, "--json")
    rows = [
        {"text": f"held out {number}", "language": "ab"[number % 2], "prompt": "read: "}
        for number in range(10)
    ]
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows)))
    done = run(made, "--text", held_out, *options, command="evaluate")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["languages"][0]["language"] == "all"
    assert {each["language"] for each in report["languages"][1:]} == {"a", "b"}
    assert report["storage"]["sparsity"] == 0.5
    assert 8 < report["storage"]["bits_per_weight"] < 20
    assert report["languages"][0]["ratio"] != 1
    assert all(0 < each["error"] < 1 for each in report["weights"])
    assert {path.name for path in out.iterdir()} >= {"report.json", "report.md", "languages.png"}
    assert "| all | 10 |" in (out / "report.md").read_text()
    same = run(text_checkpoint, "--text", text, *options, command="evaluate")
    assert json.loads(same.stdout)["languages"][0]["ratio"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--length", "2"), "no document"), (("--device", "moon"), "cannot be used")],
)
def test_what_cannot_be_evaluated_is_told(
    arguments: tuple[str, str], message: str, text_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"text": "b", "prompt": "quite a long prompt"}))
    options = ("--original", text_checkpoint, "--text", path, *arguments)
    done = run(text_checkpoint, *options, command="evaluate")
    assert done.exit_code == 1 and message in " ".join(done.output.split())
