"""How long until a newcomer sees an answer: `make demo` in a fresh clone, set-up included.

Clones the commit that is checked out, without its virtual environment, and times the whole command.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from .records import FOLDER, write_headline, write_result


def main() -> None:
    """Time one `make demo` and write it down."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(FOLDER.parent), str(clone)], check=True)
        started = time.perf_counter()
        done = subprocess.run(["make", "demo"], cwd=clone, env=_bare_environment(), check=False)
        seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"`make demo` failed with {done.returncode}; no figure is written")
    print(f"make demo took {seconds:.0f} s")
    write_result("demo", {"seconds": seconds})
    write_headline("demo_seconds", seconds, "s", (seconds, seconds))


def _bare_environment() -> dict[str, str]:
    """The environment without the virtual environment that runs this script."""
    environment = {k: v for k, v in os.environ.items() if k not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    active = os.environ.get("VIRTUAL_ENV") or str(Path(shutil.which("python") or "").parent.parent)
    paths = [p for p in environment["PATH"].split(os.pathsep) if not p.startswith(active)]
    return {**environment, "PATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    main()
