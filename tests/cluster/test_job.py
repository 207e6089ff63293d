"""The README's way into a Ray cluster: `ray start --head`, then `ray job submit`."""

import json
import shutil
import socket
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest

from conclave.orchestrator.client import Client


def clean_copy(ground: Any) -> str:
    """The source tree as in a fresh clone: Ray uploads all of its working directory, caches too."""
    hidden = (
        ".git",
        ".venv",
        ".scratch",
        ".*_cache",
        ".hypothesis",
        "__pycache__",
        "build",
        "dist",
    )
    tree = ground.folder / "tree"
    shutil.copytree(ground.root, tree, symlinks=True, ignore=shutil.ignore_patterns(*hidden))
    return str(tree)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0):
            return True
    except urllib.error.HTTPError:
        return True  # it wants the token, so it is up
    except OSError:
        return False


@pytest.mark.timeout(300)
def test_a_submitted_job_serves_the_fleet(ground: Any) -> None:
    ports = {name: free_port() for name in ("ray", "dashboard", "agent", "gateway")}
    jobs = f"http://127.0.0.1:{ports['dashboard']}"
    # The token makes it work whether or not a local `ray.init()` has left one behind.
    mode = {"RAY_AUTH_MODE": "token"}
    assert ground.start("token.log", "ray", "get-auth-token", "--generate", **mode).wait(60) == 0
    head = ground.start(
        "head.log",
        *("ray", "start", "--head", "--block", "--num-cpus=2", f"--port={ports['ray']}"),
        *(f"--dashboard-port={ports['dashboard']}", "--include-dashboard=true"),
        # Two Rays on one machine would else both want the same one.
        f"--dashboard-agent-listen-port={ports['agent']}",
        **mode,
        # Only what the job brings along may make the package importable.
        PYTHONPATH="",
    )
    ground.until(lambda: answers(f"{jobs}/api/version"), lambda: str(ground.log("head.log")))
    tree = clean_copy(ground)

    def submitted() -> Any:
        return ground.start(
            "submit.log",
            *("ray", "job", "submit", "--address", jobs, "--working-dir", tree),
            *("--runtime-env-json", json.dumps({"env_vars": {"PYTHONPATH": ".root"}}), "--"),
            *(sys.executable, "-m", "conclave.orchestrator.cli", "serve"),
            *("--fleet", "fleet.yaml", "--port", str(ports["gateway"])),
            **mode,
        )

    submit = submitted()

    def serves() -> bool:
        nonlocal submit
        # Ray's dashboard answers before the node's agent, which runs jobs, has come up.
        if submit.poll() is not None and "No available agent" in ground.log("submit.log"):
            submit = submitted()
        return "\ngateway " in ground.log("submit.log")

    ground.until(serves, lambda: str(ground.log("submit.log")))
    address = ground.logged("submit.log", "gateway ")
    with Client(address) as client:
        ground.serving(client, 3, "submit.log")
        answer = client.generate("Package: git\nLanguage: de\n\n", max_tokens=8, ignore_eos=True)
        assert answer.usage.completion_tokens == 8
    assert submit.poll() is None, "the job must go on serving"
    head.terminate()
    head.wait(60)
