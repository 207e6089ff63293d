"""Files between the steps, and the error of a step whose file is not there yet.

Given up: checking whether a file that is there fits the ones made before it.
"""

from __future__ import annotations

import json
from pathlib import Path


class RouteError(Exception):
    """A step cannot be taken as asked; the message says what to do."""


def written_by(step: str, path: Path) -> Path:
    """The path, if its step has been taken."""
    if not path.exists():
        raise RouteError(f"{path} is missing: write it with `{step}`")
    return path


def write_json(path: Path, content: object) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
