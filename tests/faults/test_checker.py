"""The checker finds every kind of broken promise in hand-made ledgers, and none in a good one."""

from pathlib import Path
from typing import Any

import pytest

from .checker import KINDS, check
from .ledger import Ledger, read

TRUTH = list(range(100, 110))


def entry(kind: str, **fields: Any) -> dict[str, Any]:
    return {"t": fields.pop("t", 1.0), "kind": kind, **fields}


def ask(**fields: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "request": "r",
        "streams": True,
        "outputs": 1,
        "tokens": len(TRUTH),
        "exact": True,
        "truth": {"0": TRUTH},
    }
    return entry("ask", **given | fields)


def tokens(ids: list[int], index: int = 0, **fields: Any) -> dict[str, Any]:
    return entry("tokens", **{"request": "r", "output": 0, "index": index, "ids": ids} | fields)


def finished(count: int = len(TRUTH), reason: str = "LENGTH", **fields: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "request": "r",
        "how": "finished",
        "counts": {"0": count},
        "reasons": {"0": reason},
    }
    return entry("end", **given | fields)


def failed(code: str = "UNAVAILABLE", **fields: Any) -> dict[str, Any]:
    return entry("end", **{"request": "r", "how": "failed", "code": code, "message": "m"} | fields)


def fault(number: int = 1, allows: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    given = {"fault": number, "name": "kill", "target": "w", "allows": list(allows)}
    return entry("fault", **given | fields)


def effect(number: int = 1) -> dict[str, Any]:
    return entry("effect", fault=number, evidence="seen")


def healed(number: int = 1, t: float = 1.0) -> dict[str, Any]:
    return entry("healed", fault=number, seconds=1.0, t=t)


GOOD = [ask(), tokens(TRUTH[:4]), tokens(TRUTH[4:], 4), finished()]
NO_TRUTH = {"truth": None}

BAD: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "no end": ("lost", GOOD[:-1]),
    "no answer at all": ("lost", [ask()]),
    "a token twice, by truth": (
        "duplicated",
        [ask(), tokens(TRUTH[:4]), tokens(TRUTH[3:9], 4), finished()],
    ),
    "a token twice, by count": (
        "duplicated",
        [ask(**NO_TRUTH), tokens([*TRUTH, 7]), finished()],
    ),
    "more than asked": (
        "duplicated",
        [ask(tokens=9, **NO_TRUTH), tokens(TRUTH), finished()],
    ),
    "an index twice": ("duplicated", [ask(), tokens(TRUTH), tokens([109], 9), finished(11)]),
    "a token left out, by truth": (
        "skipped",
        [ask(tokens=9, exact=False), tokens(TRUTH[:4]), tokens(TRUTH[5:], 4), finished(9)],
    ),
    "a token left out, by count": ("skipped", [ask(**NO_TRUTH), tokens(TRUTH[:9]), finished()]),
    "an index left out": ("skipped", [ask(), tokens(TRUTH[:4]), tokens(TRUTH[4:], 5), finished()]),
    "another token": ("differs", [ask(), tokens([*TRUTH[:9], 7]), finished()]),
    "a resumed stream that goes astray": (
        "differs",
        [ask(), tokens(TRUTH[:4]), tokens([9, 8, 7, 6, 5, 4], 4), finished(resumes=1)],
    ),
    "short by length": ("truncated", [ask(**NO_TRUTH), tokens(TRUTH[:9]), finished(9)]),
    "short by a stop that nobody asked for": (
        "truncated",
        [ask(**NO_TRUTH), tokens(TRUTH[:9]), finished(9, "STOP")],
    ),
    "stopped before its truth": (
        "truncated",
        [ask(exact=False), tokens(TRUTH[:9]), finished(9, "STOP")],
    ),
    "an output without an end": (
        "truncated",
        [ask(outputs=2, **NO_TRUTH), tokens(TRUTH), finished()],
    ),
    "no reason": ("truncated", [ask(), tokens(TRUTH), finished(reason="UNSPECIFIED")]),
    "scores missing": (
        "truncated",
        [ask(scores=2), entry("scored", request="r", count=1), finished()],
    ),
    "two terminal events": ("several_ends", [*GOOD, finished()]),
    "an event and a status": (
        "several_ends",
        [*GOOD, entry("end", request="r", how="status", code="INTERNAL", message="m")],
    ),
    "a token after the end": ("after_end", [*GOOD, tokens([], 10)]),
    "an error for no reason": ("broken", [ask(), tokens(TRUTH[:4]), failed()]),
    "an error before the fault": (
        "broken",
        [ask(), failed(t=1.0), fault(allows=("UNAVAILABLE",), t=2.0), effect(), healed(t=3.0)],
    ),
    "an error after the fault": (
        "broken",
        [fault(allows=("UNAVAILABLE",), t=1.0), effect(), healed(t=2.0), ask(t=3.0), failed(t=4.0)],
    ),
    "another error than allowed": (
        "broken",
        [fault(allows=("RESOURCE_EXHAUSTED",)), effect(), healed(), ask(), failed()],
    ),
    "a fault without effect": ("no_effect", [*GOOD, fault(), healed()]),
    "a fault that lasts": ("not_healed", [*GOOD, fault(), effect()]),
    "an improper answer": ("improper", [entry("improper", method="/m", answer="UNKNOWN: oops")]),
    "a slot held": ("leaked", [*GOOD, entry("rest", worker="w", running=1)]),
    "blocks held": ("leaked", [*GOOD, entry("rest", worker="w", running=0, blocks=3)]),
    "an ask open": ("leaked", [*GOOD, entry("rest", worker="gateway", open=1)]),
}


@pytest.mark.parametrize("name", BAD)
def test_finds(name: str) -> None:
    kind, entries = BAD[name]
    assert {violation.kind for violation in check(entries).violations} == {kind}


def test_every_kind_is_tried() -> None:
    assert {kind for kind, _ in BAD.values()} == set(KINDS)


@pytest.mark.parametrize(
    "entries",
    [
        GOOD,
        [ask(exact=False), tokens(TRUTH), finished(reason="STOP")],
        [ask(**NO_TRUTH, exact=False), tokens(TRUTH[:3]), finished(3, "STOP")],
        [ask(), tokens(TRUTH[:3]), entry("cancel", request="r")],
        [ask(scores=2), entry("scored", request="r", count=2), finished()],
        [fault(allows=("UNAVAILABLE",)), effect(), ask(), failed(), healed(t=2.0)],
        [
            *(fault(allows=("UNAVAILABLE",)), effect(), *GOOD),
            entry("end", request="r", how="status", code="UNAVAILABLE", message="m"),
            healed(t=2.0),
        ],
        [*GOOD, entry("rest", worker="w", running=0, waiting=0, blocks=0, open=0)],
    ],
    ids=[
        "plain",
        "stop",
        "early stop",
        "cancel",
        "score",
        "excused",
        "cut behind its end",
        "at rest",
    ],
)
def test_accepts(entries: list[dict[str, Any]]) -> None:
    verdict = check(entries)
    assert not verdict.violations, verdict


def test_counts() -> None:
    verdict = check([*GOOD, fault(), effect(), healed()])
    assert (verdict.asks, verdict.tokens, dict(verdict.faults)) == (1, 10, {"kill": 1})
    assert dict(verdict.ends) == {"finished": 1}


def test_a_ledger_survives_its_writer(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.note("ask", request="r", truth={"0": [1]})
        ledger.note("tokens", request="r", output=0, index=0, ids=[1])
    kept = list(read(tmp_path / "ledger.jsonl"))
    assert [each["kind"] for each in kept] == ["ask", "tokens"]
    assert kept[0]["t"] <= kept[1]["t"]
    with Ledger(tmp_path / "ledger.jsonl") as again:
        again.note("cancel", request="r")
        assert len(again.entries()) == 3
