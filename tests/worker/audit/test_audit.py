"""An audit finds what holds, what does not, and what it all takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conclave.kernels.attention import reference
from conclave.kernels.attention.cache import KVFormat
from conclave.worker.audit.counting import relative_errors
from conclave.worker.audit.reading import audit
from conclave.worker.audit.storing import through_cache
from conclave.worker.compress.__main__ import app
from conclave.worker.compress.quality.evaluation import Document
from conclave.worker.errors import ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.weights import load_decoder

TinyCheckpoint = Callable[[int | str], Path]
ERRORS = (0.005, 0.01, 0.12, 0.3)
DOCUMENTS = [Document("en", tuple(range(3, 60))), Document("de", tuple(range(90, 40, -1)), start=9)]


def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store takes a value for one that is 2 % larger, and does not know it."""
    store = reference.store

    def wrong(key: Any, value: torch.Tensor, *rest: Any) -> None:
        store(key, value * 1.02, *rest)

    monkeypatch.setattr(reference, "store", wrong)


@pytest.mark.parametrize("variant", [1, 3])
def test_every_promise_holds(tiny_checkpoint: TinyCheckpoint, variant: int) -> None:
    config = ModelConfig.load(tiny_checkpoint(variant))
    decoder = load_decoder(tiny_checkpoint(variant), config, torch.device("cpu"), torch.float32)
    found = audit(decoder, DOCUMENTS, ERRORS)
    owners = [i for i, layer in enumerate(config.layers) if layer.kv_source == i]
    vectors = 2 * 107 * sum(config.layers[i].kv_heads for i in owners)
    for each in found:
        assert each.held and each.errors.within == 1 and each.failed == each.short == 0
        assert each.errors.vectors == vectors and each.errors.worst is not None
        assert 0 < each.errors.worst.error <= each.max_error
        assert [layer.layer for layer in each.layers] == owners
        assert sum(each.widths.values()) == vectors / 2
        assert {one.language for one in each.languages} == {"all", "en", "de"}
    strict, loose = found[0], found[-1]
    assert 0 <= strict.languages[0].divergence < loose.languages[0].divergence
    assert strict.second > 0.3 > loose.second and loose.saving > strict.saving
    assert loose.saving > 0.5 and set(loose.widths) == {"4", "8"}
    values_alone = any(not config.layers[i].has_value_projection for i in owners)
    assert any(layer.stored == "values" for layer in strict.layers) == values_alone


def test_what_is_too_far_off_is_found(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.load(tiny_checkpoint(1))
    decoder = load_decoder(tiny_checkpoint(1), config, torch.device("cpu"), torch.float32)
    spoiled(monkeypatch)
    near, far = audit(decoder, DOCUMENTS, (0.01, 0.03))
    assert not near.held and near.errors.within < 0.6 and near.failed == 0
    assert {place.side for place in near.errors.excesses} <= {"key", "value"}
    assert near.errors.excesses[0].error > 0.01
    assert far.held


def test_ids_that_the_model_lacks_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    config = ModelConfig.load(tiny_checkpoint(1))
    decoder = load_decoder(tiny_checkpoint(1), config, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"document 3 has token id 512.*tokenizer"):
        audit(decoder, [*DOCUMENTS, Document("en", (3, 4, 512))], ERRORS)


def test_errors_are_those_of_the_two_vectors() -> None:
    exact = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    read = torch.tensor([[[3.0, 4.5], [0.0, 0.0]]])
    assert relative_errors(exact, read).tolist() == [[0.1, 0.0]]


@pytest.mark.parametrize("format", [KVFormat(2, 64, 8), KVFormat(1, 128, 4), KVFormat(3, 24, 8)])
def test_bytes_are_those_of_the_tensors(format: KVFormat) -> None:
    key, value = torch.randn(2, 32, format.kv_heads, format.head_dim)
    taken = through_cache(key, value, format, None, 0.3).bytes
    sum_of_token = taken.codes + taken.scales + taken.indices
    assert sum_of_token == format.token_bytes
    assert taken.row == format.row_bytes + 4


def test_the_command(
    text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.jsonl"
    lines = [{"text": "the cat sat on the mat " * 3, "language": name} for name in ("en", "fr")]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["audit", str(text_checkpoint), "--text", str(text), "--device", "cpu"]
    asked += ["--max-error", "0.005", "--max-error", "0.03"]
    done = CliRunner().invoke(app, [*asked, "--json", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [each["max_error"] for each in report["audits"]] == [0.005, 0.03]
    for each in report["audits"]:
        assert each["held"] and each["errors"]["within"] == 1 and each["bytes"] > 0
        assert {one["language"] for one in each["languages"]} == {"all", "en", "fr"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"audit.json", "audit.md", "errors-0.005.png", "errors-0.03.png"} <= written
    shown = CliRunner().invoke(app, asked)
    assert "100%" in shown.output and "held" in shown.output
    spoiled(monkeypatch)
    assert CliRunner().invoke(app, asked).exit_code == 1
    refused = CliRunner().invoke(app, [*asked[:-1], "0.9"])
    assert refused.exit_code != 0 and "0.001 to 0.5" in refused.output


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        ("audit", "file", "no folder to write to (File exists)"),
        ("audit", "file/in", "no folder to write to (Not a directory)"),
        ("audit", "taken", "errors-0.03.png is a folder"),
        ("evaluate", "file", "no folder to write to (File exists)"),
        ("evaluate", "taken", "report.md is a folder"),
    ],
)
def test_what_is_in_the_way_of_a_report_is_told_first(
    command: str, out: str, message: str, tmp_path: Path
) -> None:
    """Before the text, which is not there, is looked for."""
    (tmp_path / "file").touch()
    for name in ("errors-0.03.png", "report.md"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    asked = [command, str(tmp_path), "--text", str(tmp_path / "none"), "--device", "cpu"]
    asked += ["--max-error", "0.03"] if command == "audit" else ["--original", str(tmp_path)]
    done = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / out)])
    # A console breaks lines, and long names too.
    assert done.exit_code == 1 and "".join(message.split()) in "".join(done.output.split())
