"""A fleet that cannot run says why and ends."""

import sys
from typing import Any


def test_a_bad_checkpoint_is_told(ground: Any) -> None:
    fleet = ground.fleet_file("bad", model=str(ground.folder / "nothing"))
    process = ground.start(
        "bad.log",
        *(sys.executable, "-m", "conclave.orchestrator.cli", "serve", "--fleet", str(fleet)),
    )
    assert process.wait(120) == 1, ground.log("bad.log")
    log = ground.log("bad.log")
    assert "worker w-0 down" in log and "CheckpointError" in log
    assert "error: no worker could be started" in log
    assert "Traceback" not in log
