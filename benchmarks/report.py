"""Makes RESULTS.md from `results/*.json`, and puts the headline figures into the README."""

import json
import re
from pathlib import Path
from typing import Any

from .records import FOLDER, HEADLINE, RESULTS

README = FOLDER.parent / "README.md"
LONGEST_TABLE = 80
MARKERS = ("<!-- headline -->", "<!-- /headline -->")


def main() -> None:
    """Write both files afresh."""
    records = json.loads(HEADLINE.read_text())
    sections = [_section(path) for path in sorted(RESULTS.glob("*.json"))]
    body = "\n\n".join([INTRODUCTION, _headline_table(records), *sections])
    (FOLDER / "RESULTS.md").write_text(body + "\n")
    start, end = MARKERS
    text = README.read_text()
    table = f"{start}\n{_headline_table(records)}\n{end}"
    README.write_text(re.sub(f"{start}.*?{end}", lambda _: table, text, flags=re.DOTALL))


INTRODUCTION = """# Results

Made by `python -m benchmarks.report` from `results/*.json` and `headline.json`, never by hand.
Each section names the command that repeats it. Medians, with the lowest and highest run."""


def _headline_table(records: dict[str, Any]) -> str:
    rows = ["| figure | value | spread | device | command |", "| --- | --- | --- | --- | --- |"]
    for name, record in records.items():
        low, high = record["spread"]
        rows.append(
            f"| {name} | {record['value']:g} {record['unit']} | {low:g} to {high:g} "
            f"| {record['device']} | `{record['command']}` |"
        )
    return "\n".join(rows)


def _section(path: Path) -> str:
    record = json.loads(path.read_text())
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"## {path.stem}",
        "",
        f"`{record['command']}` · {record['device']} · {record['date']} · "
        f"commit {record['commit']} · {versions}",
        "",
    ]
    if path.with_suffix(".png").exists():
        lines += [f"![{path.stem}](results/{path.stem}.png)", ""]
    return "\n".join([*lines, *_figures(record["figures"], path.name)])


def _figures(figures: dict[str, Any], source: str) -> list[str]:
    """A table for each list of rows that is not very long, a bullet for everything else."""
    lines: list[str] = []
    for name, value in figures.items():
        if isinstance(value, list) and len(value) > LONGEST_TABLE:
            lines += ["", f"- {name}: {len(value)} of them in `results/{source}`"]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            heads = list(value[0])
            lines += ["", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
            lines += [f"| {' | '.join(_number(row[head]) for head in heads)} |" for row in value]
        elif isinstance(value, dict):
            parts = ", ".join(f"{key} {_number(part)}" for key, part in value.items())
            lines.append(f"- {name}: {parts}")
        else:
            lines.append(f"- {name}: {_number(value)}")
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
