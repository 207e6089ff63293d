"""What `conclave serve` does beside serving."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conclave.orchestrator.cli import app
from conclave.orchestrator.cli.run import _update
from conclave.orchestrator.config import FleetConfig
from conclave.orchestrator.fleet.fleet import Fleet
from conclave.worker.errors import ConfigError

FILE = "name: {name}\nworkers: [{{name: a, revision: '{revision}', engine: {{model: m}}}}]\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(FILE.format(name="f", revision=1))
    return path


def test_a_follower_needs_a_cluster(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = CliRunner().invoke(app, ["serve", "--follow", "--fleet", str(file)])
    assert result.exit_code == 2
    assert "--follow needs the Ray cluster of the other gateway" in result.stderr


def test_the_file_is_read_again(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_cluster: Any = None
    fleet = Fleet(FleetConfig.load(file), no_cluster)

    def reread() -> FleetConfig:
        return FleetConfig.load(file)

    before = fleet._specs["a"].version
    file.write_text(FILE.format(name="f", revision=2))
    _update(fleet, reread)
    after = fleet._specs["a"].version
    assert after != before
    other = FILE.format(name="other", revision=3)
    for broken, message in (("workers: [", "is not YAML"), (other, "cannot become other")):
        file.write_text(broken)
        _update(fleet, reread)
        assert fleet._specs["a"].version == after
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the fleet's name is f and cannot become other"):
        fleet.update(reread())
