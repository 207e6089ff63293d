"""`conclave compress` as a user meets it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from conclave.kernels.integer.weights import is_whole
from conclave.worker import Engine, Knobs
from conclave.worker.compress.__main__ import app
from conclave.worker.compress.reader import load_compressed
from conclave.worker.compress.recipe import Recipe
from conclave.worker.errors import ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.packed import PackedGate, PackedLinear

CPU = torch.device("cpu")
LINEARS = (PackedLinear, PackedGate)
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
    assert {each["format"] for each in weights[4:-1]} == {"8:16-bf16"}
    assert (weights[-1]["name"], weights[-1]["format"]) == ("embedding.weight", "dense-int8-g64")
    with Engine(made, max_context=96, kv_tokens=1024, block_size=4, threads=1) as engine:
        assert len(engine.generate("hello", max_tokens=4, ignore_eos=True).token_ids) == 4
    again = run(text_checkpoint, made, "--text", text, *SMALL)
    assert again.exit_code == 1 and "finished checkpoint" in again.output


def test_recovered(text: Path, text_checkpoint: Path, tmp_path: Path) -> None:
    pruned, made = tmp_path / "made.one-shot", tmp_path / "made"
    options = ("--text", text, *SMALL, "--recover", "4", "--json")
    done = run(text_checkpoint, made, *options)
    assert done.exit_code == 0, done.output
    about = json.loads((made / "conclave.json").read_text())["about"]
    assert about["recovery"]["looks"][-1]["step"] == 4
    assert about["weights"] == json.loads(done.stdout)["weights"]

    other = tmp_path / "other"
    by_hand = ("--original", text_checkpoint, "--text", text, "--length", "16", "--steps", "4")
    assert run(pruned, other, *by_hand, "--device", "cpu", command="recover").exit_code == 0
    assert (other / "rest.safetensors").read_bytes() == (made / "rest.safetensors").read_bytes()

    more = ("--synthetic", "3", "--remap", "0.5", "--minutes", "5", "--device", "cpu", "--json")
    done = run(pruned, tmp_path / "third", *by_hand, *more, command="recover")
    assert done.exit_code == 0, done.output
    account = json.loads((tmp_path / "third/conclave.json").read_text())["about"]["recovery"]
    before = json.loads((other / "conclave.json").read_text())["about"]["recovery"]
    assert account["sequences"] == [before["sequences"][0] + 3, 16]
    assert account["schedule"]["remap"] == 0.5

    again = run(text_checkpoint, tmp_path / "made", *options, "--mode", "magnitude")
    assert again.exit_code == 1 and "other settings" in " ".join(again.output.split())
    refused = run(pruned, other, *by_hand, "--gradual", "2", command="recover")
    assert refused.exit_code == 1 and "gradual is 2" in " ".join(refused.output.split())


def test_whole_scales(text: Path, text_checkpoint: Path, tmp_path: Path) -> None:
    """In every weight of four bits, pruned and after it was recovered."""
    made = tmp_path / "made"
    options = ("--format", "5:16-int4-g32", "--keep", "*.out.weight=dense-int8-g32")
    own = ("--text", text, *SMALL, *options, "--whole-scales", "--recover", "2")
    done = run(text_checkpoint, made, *own)
    assert done.exit_code == 0, done.output
    for folder in (made, tmp_path / "made.one-shot"):
        decoder = load_compressed(
            folder, ModelConfig.load(folder), CPU, torch.bfloat16, packed=True
        )
        found = [m.weight for m in decoder.layers.modules() if isinstance(m, LINEARS)]
        assert {weight.format.bits for weight in found} == {4, 8}
        assert all(is_whole(weight) for weight in found if weight.format.bits == 4)


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
    others = (("--format", "5:16-bf16"), ("--sparsity", "0.6"), ("--keep", "layers.0.*"))
    for option in (*others, ("--embeddings", "plain")):
        refused = run(text_checkpoint, tmp_path / "no", *options, *option)
        assert refused.exit_code == 1
        assert f"leave {option[0]} out" in " ".join(refused.output.split())


def test_sparse_on_average(text: Path, text_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--text", text, *SMALL, "--sparsity", "0.65", "--embeddings", "plain", "--json")
    done = run(text_checkpoint, tmp_path / "made", *options)
    assert done.exit_code == 0, done.output
    formats = {each["format"] for each in json.loads(done.stdout)["weights"]}
    assert len(formats) > 1 and formats <= {f"{kept}:16-bf16" for kept in (4, 5, 6, 8)}


def test_the_knobs_of_an_engine_say_the_same(
    text: Path, text_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--text", text, *SMALL[:-2], "--embeddings", "plain", "--json")
    sparse = ("--sparsity", "0.65", "--weight-bits", "16")
    done = run(text_checkpoint, tmp_path / "sparse", *options, *sparse)
    assert done.exit_code == 0, done.output
    formats = {each["format"] for each in json.loads(done.stdout)["weights"]}
    assert len(formats) > 1 and formats <= {f"{kept}:16-bf16" for kept in (4, 5, 6, 8)}
    dense = ("--weight-bits", "8", "--sparsity", "0", "--keep", "layers.*.mlp.*")
    done = run(text_checkpoint, tmp_path / "dense", *options, *dense)
    assert done.exit_code == 0, done.output
    formats = {each["format"] for each in json.loads(done.stdout)["weights"]}
    assert formats == {"dense-int8-g64", "as it was"}
    small: dict[str, Any] = {"max_context": 96, "kv_tokens": 1024, "block_size": 4, "threads": 1}
    with (
        Engine(tmp_path / "sparse", knobs={"sparsity": 0.65, "weight_bits": 16}, **small) as one,
        Engine(tmp_path / "dense", knobs={"sparsity": 0, "weight_bits": 8}, **small) as other,
    ):
        assert 0.65 <= one.model.storage.precision.sparsity < 0.7
        assert other.model.storage.precision.sparsity == 0
    with pytest.raises(ConfigError, match="weight_bits is 4 and its weights have 8"):
        Engine(tmp_path / "dense", knobs={"weight_bits": 4}, **small)


def test_knobs_that_compress_nothing_are_told() -> None:
    assert str(Recipe.from_knobs(Knobs(sparsity=0.6, weight_bits=4)).format) == "6:16-int4-g64"
    with pytest.raises(ConfigError, match="compress nothing: give a sparsity"):
        Recipe.from_knobs(Knobs(weight_bits=16))
    with pytest.raises(ConfigError, match="memory_budget is a knob of engines"):
        Recipe.from_knobs(Knobs(sparsity=0.5, memory_budget=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "5:16"), "5:16-int4-g128"),
        (("--mode", "luck"), "magnitude, wanda, sparsegpt"),
        (("--keep", "layers.*=int3"), "int3"),
        (("--sequences", "100000"), "Give more text"),
        (("--sparsity", "0.9"), "--sparsity: must be 0 to 0.75"),
        (("--sparsity", "0.3"), "out of reach"),
        (("--embeddings", "5:16-int4-g64"), "choose a dense format, or plain"),
        (("--embeddings", "int8"), "no format; write"),
        (("--weight-bits", "8"), "--format and --weight-bits both say"),
        (("--weight-bits", "5"), "--weight-bits: choose one of 4, 8, 16 (given: 5)"),
        (("--whole-scales",), "--whole-scales is for weights of 4 bits"),
    ],
)
def test_wrong_options_are_told(
    arguments: tuple[str, ...], message: str, text: Path, text_checkpoint: Path, tmp_path: Path
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
