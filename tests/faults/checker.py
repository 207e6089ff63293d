"""What is wrong with a ledger: every promise that a caller was given and that was not kept. Pure.

lost          a request has no end at all
duplicated    a token came twice
skipped       a token is missing between two others
differs       a token is another one than the unbroken answer has
truncated     it ended as if well, with fewer tokens than it should have
several_ends  more than one terminal event or status
after_end     something came after the end
broken        it ended with an error that no fault excuses
no_effect     a fault changed nothing that one could see
not_healed    after a fault not everything served again
leaked        a slot, a block or an open ask is held though nothing is asked
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Entry = Mapping[str, Any]

KINDS = (
    "lost",
    "duplicated",
    "skipped",
    "differs",
    "truncated",
    "several_ends",
    "after_end",
    "broken",
    "no_effect",
    "not_healed",
    "improper",
    "leaked",
)
STOP = "STOP"
LENGTH = "LENGTH"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    kind: str
    subject: str
    """The request, the fault or the worker."""
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}: {self.detail}"


@dataclass(slots=True)
class History:
    """All that a ledger says of one request."""

    ask: Entry
    tokens: dict[int, list[int]] = field(default_factory=dict)
    gaps: list[Violation] = field(default_factory=list)
    ends: list[Entry] = field(default_factory=list)
    late: int = 0
    cancelled: bool = False
    scored: int | None = None
    begun: float = 0.0
    ended: float = float("inf")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a ledger amounts to."""

    violations: tuple[Violation, ...]
    asks: int
    tokens: int
    faults: Mapping[str, int]
    ends: Mapping[str, int]
    """How the requests ended, by name of the end."""
    resumes: int

    def __str__(self) -> str:
        ends = ", ".join(f"{name} {count}" for name, count in sorted(self.ends.items()))
        found = "".join(f"\n  {violation}" for violation in self.violations[:20])
        return (
            f"{self.asks} requests ({ends}), {self.tokens} tokens, {sum(self.faults.values())} "
            f"faults, {self.resumes} resumes, {len(self.violations)} violations{found}"
        )


def check(entries: Sequence[Entry]) -> Verdict:
    """Reads a whole ledger."""
    histories = _histories(entries)
    faults = [entry for entry in entries if entry["kind"] == "fault"]
    found = [*_faults(entries, faults), *_signs(entries)]
    healed = {entry["fault"]: entry["t"] for entry in entries if entry["kind"] == "healed"}
    for request, history in histories.items():
        found += _request(request, history, _excuses(history, faults, healed))
    return Verdict(
        violations=tuple(found),
        asks=len(histories),
        tokens=sum(len(ids) for h in histories.values() for ids in h.tokens.values()),
        faults=Counter(str(fault["name"]) for fault in faults),
        ends=Counter(_end_name(history) for history in histories.values()),
        resumes=sum(end.get("resumes", 0) for h in histories.values() for end in h.ends),
    )


def _histories(entries: Iterable[Entry]) -> dict[str, History]:
    histories: dict[str, History] = {}
    for entry in entries:
        request = entry.get("request")
        if request is None:
            continue
        if entry["kind"] == "ask":
            histories[request] = History(entry, begun=entry["t"])
        else:
            _add(histories[request], entry)
    return histories


def _add(history: History, entry: Entry) -> None:
    kind = entry["kind"]
    if kind == "cancel":
        history.cancelled = True
        history.ended = min(history.ended, entry["t"])
        return
    if history.ends and kind != "end":
        history.late += 1
    if kind == "tokens":
        ids = history.tokens.setdefault(entry["output"], [])
        gap = entry["index"] - len(ids)
        if gap:
            name = "skipped" if gap > 0 else "duplicated"
            detail = f"output {entry['output']}: token {entry['index']} came after {len(ids)}"
            history.gaps.append(Violation(name, entry["request"], detail))
        ids += entry["ids"]
    elif kind == "scored":
        history.scored = entry["count"]
    elif kind == "end":
        history.ends.append(entry)
        history.ended = min(history.ended, entry["t"])


def _cut_behind(ends: Sequence[Entry], excuses: frozenset[str]) -> bool:
    """Whether a stream ended well and a fault then cut the connection before gRPC's own end."""
    return (
        [end["how"] for end in ends] == ["finished", "status"]
        and ends[1]["code"] == "UNAVAILABLE"
        and "UNAVAILABLE" in excuses
    )


def _request(request: str, history: History, excuses: frozenset[str]) -> Iterator[Violation]:
    yield from history.gaps
    if history.late:
        yield Violation("after_end", request, f"{history.late} entries")
    ends = history.ends
    if len(ends) > 1 and not _cut_behind(ends, excuses):
        hows = ", ".join(str(end["how"]) for end in history.ends)
        yield Violation("several_ends", request, hows)
    for output, ids in history.tokens.items():
        yield from _against_truth(request, history, output, ids)
    if history.cancelled:
        return
    if not history.ends:
        got = sum(len(ids) for ids in history.tokens.values())
        yield Violation("lost", request, f"no end after {got} tokens")
        return
    end = history.ends[0]
    if end["how"] == "finished":
        yield from _well_ended(request, history, end)
    elif end["code"] not in excuses:
        yield Violation("broken", request, f"{end['code']}: {end['message']}")


def _against_truth(
    request: str, history: History, output: int, ids: Sequence[int]
) -> Iterator[Violation]:
    """Where an answer leaves the unbroken one, and whether by a token twice or one too few."""
    truth = (history.ask.get("truth") or {}).get(str(output))
    if truth is None or list(ids) == truth[: len(ids)]:
        return
    at = next((i for i, (a, b) in enumerate(zip(ids, truth, strict=False)) if a != b), len(truth))
    rest = list(ids[at : at + 8])
    for back in range(1, at + 1):
        if rest == truth[at - back : at - back + len(rest)]:
            yield Violation("duplicated", request, f"output {output}: {back} tokens at {at}")
            return
    for ahead in range(1, len(truth) - at):
        if rest == truth[at + ahead : at + ahead + len(rest)]:
            yield Violation("skipped", request, f"output {output}: {ahead} tokens at {at}")
            return
    expected = truth[at] if at < len(truth) else "its end"
    got = ids[at] if at < len(ids) else "nothing"
    yield Violation("differs", request, f"output {output}: {got}, not {expected}, at {at}")


def _well_ended(request: str, history: History, end: Entry) -> Iterator[Violation]:
    ask = history.ask
    if ask.get("scores") is not None:
        if history.scored != ask["scores"]:
            yield Violation("truncated", request, f"{history.scored} of {ask['scores']} scores")
        return
    counts, reasons = end.get("counts", {}), end.get("reasons", {})
    for output in range(ask["outputs"]):
        got, reason = len(history.tokens.get(output, ())), reasons.get(str(output))
        told = counts.get(str(output))
        where = f"output {output}: {got} tokens came, the end counts {told}, asked {ask['tokens']}"
        if told is None or reason not in (STOP, LENGTH):
            yield Violation("truncated", request, f"output {output} has no end ({reason})")
        elif got > told:
            yield Violation("duplicated", request, where)
        elif got < told:
            yield Violation("skipped", request, where)
        elif got < ask["tokens"] and (reason == LENGTH or ask["exact"]):
            yield Violation("truncated", request, where)
        elif got > ask["tokens"]:
            yield Violation("duplicated", request, where)
        else:
            yield from _whole_truth(request, history, output, got)


def _whole_truth(request: str, history: History, output: int, got: int) -> Iterator[Violation]:
    truth = (history.ask.get("truth") or {}).get(str(output))
    if truth is not None and got < len(truth) and history.tokens[output] == truth[:got]:
        detail = f"output {output}: {got} tokens, the unbroken answer has {len(truth)}"
        yield Violation("truncated", request, detail)


def _excuses(
    history: History, faults: Sequence[Entry], healed: Mapping[Any, float]
) -> frozenset[str]:
    """The codes that faults allow which were in force while the request was open."""
    codes: set[str] = set()
    for fault in faults:
        end = healed.get(fault["fault"], float("inf"))
        if fault["allows"] and fault["t"] <= history.ended and history.begun <= end:
            codes.update(fault["allows"])
    return frozenset(codes)


def _faults(entries: Sequence[Entry], faults: Sequence[Entry]) -> Iterator[Violation]:
    effective = {entry["fault"] for entry in entries if entry["kind"] == "effect"}
    healed = {entry["fault"] for entry in entries if entry["kind"] == "healed"}
    for fault in faults:
        subject = f"{fault['name']}#{fault['fault']}"
        if fault["fault"] not in effective:
            yield Violation("no_effect", subject, f"on {fault['target']}")
        if fault["fault"] not in healed:
            yield Violation("not_healed", subject, f"on {fault['target']}")


def _signs(entries: Sequence[Entry]) -> Iterator[Violation]:
    for entry in entries:
        held = {k: entry[k] for k in ("running", "waiting", "blocks", "open") if entry.get(k)}
        if entry["kind"] == "rest" and held:
            yield Violation("leaked", str(entry["worker"]), str(held))
        elif entry["kind"] == "improper":
            yield Violation("improper", str(entry["method"]), str(entry["answer"]))


def _end_name(history: History) -> str:
    if history.cancelled:
        return "cancelled"
    if not history.ends:
        return "none"
    end = history.ends[0]
    return str(end["how"] if end["how"] == "finished" else f"{end['how']} {end['code']}")
