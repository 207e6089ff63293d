"""Where figures go: one JSON a script in `results/`, the headline figures in `headline.json`.

A record says what was run, where, with which versions and on which commit, so that anyone can run
it again. Nothing is written by hand.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
HEADLINE = FOLDER / "headline.json"
_PACKAGES = ("torch", "triton", "ray", "grpcio", "transformers", "gemlite", "torchao")


def machine() -> str:
    """The device in words: the GPU, or the CPU with the cores this process may use."""
    try:
        import torch

        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
    except ImportError:
        pass
    cores = len(os.sched_getaffinity(0))
    return f"{_cpu_name()}, {cores} cores"


def stamp() -> dict[str, Any]:
    """Device, commit, date, versions and command of this run."""
    return {
        "device": machine(),
        "command": command(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": _versions(),
    }


def command() -> str:
    """This process, as a command to repeat it; without the folder that `--out` names."""
    name = Path(sys.argv[0]).stem
    arguments = sys.argv[1:]
    if "--out" in arguments:
        place = arguments.index("--out")
        arguments = arguments[:place] + arguments[place + 2 :]
    return " ".join(["python -m", f"benchmarks.{name}", *arguments])


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write one script's figures to `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**stamp(), "figures": figures}, indent=2) + "\n")
    return path


def write_headline(name: str, value: float, unit: str, spread: tuple[float, float]) -> None:
    """Write one headline figure; `spread` is its lowest and highest value over the runs."""
    records = json.loads(HEADLINE.read_text()) if HEADLINE.exists() else {}
    low, high = spread
    records[name] = {
        "value": round(value, 4),
        "unit": unit,
        **stamp(),
        "spread": [round(low, 4), round(high, 4)],
    }
    HEADLINE.write_text(json.dumps(dict(sorted(records.items())), indent=2) + "\n")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """`CONCLAVE_COMMIT`, for a copy of the tree without its history, or what git says."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = "+" if _git("status", "-s", "-uno") else ""
    return os.environ.get("CONCLAVE_COMMIT") or (commit + changed) or "unknown"


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True)
    return done.stdout.strip()
