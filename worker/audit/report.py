"""The report of `conclave audit`, as tables that a terminal and Markdown both show, and as JSON.

Tables are at most 80 columns wide, so that a terminal need not break them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..compress.quality.evaluation import Summary
from .counting import Errors, Place
from .findings import Finding, GroupFinding, LayerFinding

_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under heads, and what they are."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def as_json(about: Mapping[str, Any], findings: Sequence[Finding]) -> Any:
    """All of it, for scripts. A number that is not finite is null."""
    return _finite({**about, "audits": [asdict(each) for each in findings]})


def as_markdown(about: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """All of it, for people."""
    lines = [
        f"# Keys and values of {about['model']} in narrow numbers",
        "",
        f"Text: {about['text']}, {about['documents']:,} documents, {about['tokens']:,} tokens. "
        f"Ran on {about['device']} in {about['dtype']}. Errors are recomputed from what was read "
        "back, ||x - read|| / ||x|| in float64, of every key and value of every token, layer and "
        "head.",
    ]
    for table in (overview(findings), *(own for each in findings for own in details(each))):
        lines += ["", f"## {table.title}", "", f"| {' | '.join(table.heads)} |"]
        lines += ["|" + " --- |" * len(table.heads)]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def overview(findings: Sequence[Finding]) -> Table:
    """A column for each error allowed."""
    columns = [_figures(each) for each in findings]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table("Audit", ("max error", *(f"{each.max_error:g}" for each in findings)), rows)


def details(finding: Finding) -> Iterator[Table]:
    """Of one error allowed: what is above it, errors by layer, bytes, predictions by language."""
    within = f"within {finding.max_error:g}"
    if finding.errors.excesses:
        yield _excesses(finding.errors.excesses, f"The first that are not {within}")
    yield _layers(finding.layers, f"Errors in %, {within}")
    yield _groups(finding.groups, f"Bytes of a token, {within}")
    if finding.languages:
        yield _languages(finding.languages, f"Predictions, {within}")


def _figures(finding: Finding) -> dict[str, str]:
    found = {
        "held": "yes" if finding.held else "NO",
        "keys and values": f"{finding.errors.vectors:,}",
        "within": _share(finding.errors),
        "worst": _worst(finding.errors),
        "two digits": f"{finding.second:.2%}",
        "tokens failed": f"{finding.failed:,}",
        "rows lacking": f"{finding.short:,}",
        "bytes a token": f"{finding.bytes:,.1f}",
        "in bfloat16": f"{finding.plain_bytes:,.0f}",
        "saved": f"{finding.saving:.1%}",
    }
    if finding.languages:
        overall = finding.languages[0]
        found["KL, nats a token"] = f"{overall.divergence:.2e}"
        found["same first choice"] = f"{overall.agreement:.2%}"
        found["perplexity, times"] = f"{overall.ratio:.5f}"
    return found


def _share(errors: Errors) -> str:
    """Never 100 % where one is above: that is told by how many there are."""
    return f"all but {errors.above:,}" if errors.above else "100%"


def _worst(errors: Errors) -> str:
    return "-" if errors.worst is None else f"{errors.worst.error:.4%}"


def _excesses(places: Sequence[Place], title: str) -> Table:
    heads = ("document", "token", "layer", "head", "of", "error")
    rows = [
        (*map(str, (p.document, p.token, p.layer, p.head)), p.side, f"{p.error:.8f}")
        for p in places
    ]
    return Table(title, heads, rows)


def _layers(layers: Sequence[LayerFinding], title: str) -> Table:
    heads = ("layer", "stored", "wide", "of", "p50", "p99", "p99.9", "worst", "0 to max error")
    rows = []
    for layer in layers:
        about = (str(layer.layer), layer.stored, f"{layer.second:.2%}")
        for name, errors in (("k", layer.key), ("v", layer.value)):
            middle = (f"{100 * errors.percentiles[each]:.3f}" for each in ("50", "99", "99.9"))
            top = "-" if errors.worst is None else f"{100 * errors.worst.error:.3f}"
            rows.append((*about, name, *middle, top, _bars(errors.histogram[:-1])))
            about = ("", "", "")
    return Table(title, heads, rows)


def _bars(counts: Sequence[int]) -> str:
    """A histogram in a line; whatever is not empty shows."""
    top, steps = max(counts), len(_BARS) - 1
    return "".join(_BARS[math.ceil(steps * count / max(1, top))] for count in counts)


def _groups(groups: Sequence[GroupFinding], title: str) -> Table:
    """A column for each group."""
    names = ["full" if each.window is None else f"window {each.window:,}" for each in groups]
    columns = [_bytes(each) for each in groups]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table(title, ("layers", *names), rows)


def _bytes(group: GroupFinding) -> dict[str, str]:
    return {
        "stored": group.format,
        "in layers": str(len(group.layers)),
        "codes": f"{group.codes:,.1f}",
        "scales": f"{group.scales:,.1f}",
        "indices": f"{group.indices:,.1f}",
        "second digits": f"{group.pool:,.1f}",
        "all": f"{group.bytes:,.1f}",
        "in bfloat16": f"{group.plain_bytes:,.0f}",
        "saved": f"{group.saving:.1%}",
        "rows of the pool": f"{group.rows:,}",
        "of heads of tokens": f"{group.share:.2%}",
        "most in a document": f"{group.most:.2%}",
        "room in an engine": f"{group.allotted:.2%}",
    }


def _languages(languages: Sequence[Summary], title: str) -> Table:
    heads = ("language", "documents", "tokens", "KL, nats", "same first", "perplexity, times")
    rows: list[tuple[str, ...]] = [
        (
            *(each.language or "-", f"{each.documents:,}", f"{each.tokens:,}"),
            *(f"{each.divergence:.2e}", f"{each.agreement:.2%}"),
            f"{each.ratio:.4f} ({each.ratio_low:.4f} to {each.ratio_high:.4f})",
        )
        for each in languages
    ]
    return Table(title, heads, rows)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
