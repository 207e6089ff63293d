"""`conclave export` and `conclave import` as a user meets them."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from conclave.worker.compress.__main__ import app

from .conftest import Compressed, Exported, content


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def told(result: Result) -> str:
    return " ".join(result.output.split())


def test_there_and_back(compressed: Compressed, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    done = run("export", compressed("7"), out, "--json")
    assert done.exit_code == 0, done.output
    rows = {each["name"]: each for each in json.loads(done.stdout)["weights"]}
    own = rows["layers.0.attention.qkv.weight"]
    assert own["written_as"] == "pack-quantized int4, group 32" and own["format"].startswith("5:16")
    experts = [own for name, own in rows.items() if ".experts." in name and "int" in own["format"]]
    assert {each["written_as"] for each in experts} == {"plain float32"}
    assert "stock loaders have no quantized form of experts" in " ".join(done.stderr.split())
    done = run("import", out, back, "--json")
    assert done.exit_code == 0, done.output
    formats = {each["name"]: each["format"] for each in json.loads(done.stdout)["weights"]}
    assert {name: formats[name] for name in rows} == {n: own["format"] for n, own in rows.items()}
    assert content(back) == content(compressed("7"))


def test_tables_for_people(compressed: Compressed, tmp_path: Path) -> None:
    done = run("export", compressed("11"), tmp_path / "out", "--format", "dense")
    assert done.exit_code == 0 and "written as" in done.output and "plain" in done.output
    done = run("import", tmp_path / "out", tmp_path / "back")
    assert done.exit_code == 0 and "layers.0.attention.out.weight" in done.output


def test_wrong_options_are_told(compressed: Compressed, exported: Exported, tmp_path: Path) -> None:
    done = run("export", compressed("11"), tmp_path / "out", "--format", "gguf")
    assert done.exit_code == 1 and "choose one of pack-quantized, dense" in told(done)
    done = run("export", tmp_path / "nowhere", tmp_path / "out")
    assert done.exit_code == 1 and "error:" in done.output
    done = run("export", compressed("11"), exported("11", "dense"))
    assert done.exit_code == 1 and "is not empty" in told(done)
    done = run("import", tmp_path / "nowhere", tmp_path / "back")
    assert done.exit_code == 1 and "error:" in done.output
    done = run("import", exported("11", "dense"), tmp_path / "back", "--maps", tmp_path / "none")
    assert done.exit_code == 1 and "name a file of maps" in told(done)
