"""How many faults does it survive, and is any promise to a caller broken?

Injects every fault of `tests/faults` again and again, in an order of its own each round, while many
callers ask for all kinds of answers; then reads the whole ledger and counts what was broken. One
arena after the other: stub workers, real engines, a fleet in a Ray cluster of two nodes.
"""

import argparse
import asyncio
import json
import random
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import track

from tests.faults import client_faults, engine_faults, gateway_faults, ray_faults, worker_faults
from tests.faults.arena import Arena, Fault, StubArena
from tests.faults.checker import Verdict, check
from tests.faults.ledger import Entry, Ledger

from .records import write_headline, write_result

ROUNDS = 20
STUB_FAULTS = (*worker_faults.FAULTS, *client_faults.FAULTS, *gateway_faults.FAULTS)
ARENAS: dict[str, tuple[Callable[[Ledger], Awaitable[Arena]], Sequence[Fault]]] = {
    "stub": (StubArena.open, STUB_FAULTS),
    "engine": (engine_faults.EngineArena.open, engine_faults.FAULTS),
    "ray": (ray_faults.RayArena.open, ray_faults.FAULTS),
}

console = Console(stderr=True)


async def soak(name: str, options: argparse.Namespace, folder: Path) -> list[Entry]:
    """All rounds of one arena's faults; returns its ledger."""
    opened, faults = ARENAS[name]
    wanted = [fault for fault in faults if options.fault in fault.name]
    if not wanted:
        return []
    plan = [fault for number in range(options.rounds) for fault in shuffled(wanted, number)]
    with Ledger(folder / f"{name}.jsonl") as ledger:
        async with await opened(ledger) as arena:
            for fault in track(plan, f"{name}: {len(plan)} faults", console=console):
                await arena.round(fault)
        return ledger.entries()


def shuffled(faults: Sequence[Fault], number: int) -> list[Fault]:
    """The same faults in another order, the same one for the same number."""
    return random.Random(number).sample(list(faults), len(faults))


def recovery(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """How long until everything served again, by kind of fault."""
    names = {entry["fault"]: entry["name"] for entry in entries if entry["kind"] == "fault"}
    times: dict[str, list[float]] = {}
    for entry in entries:
        if entry["kind"] == "healed":
            times.setdefault(names[entry["fault"]], []).append(entry["seconds"])
    return [
        {
            "fault": name,
            "times": len(seconds),
            "healed_p50_s": median(seconds),
            "healed_p99_s": quantiles(seconds, n=100, method="inclusive")[-1]
            if len(seconds) > 1
            else seconds[0],
        }
        for name, seconds in sorted(times.items())
    ]


def figures(verdicts: dict[str, Verdict], ledgers: dict[str, list[Entry]]) -> dict[str, Any]:
    """What goes into the result."""
    every = list(verdicts.values())
    violations = [violation for verdict in every for violation in verdict.violations]
    kinds: dict[str, int] = {}
    for violation in violations:
        kinds[violation.kind] = kinds.get(violation.kind, 0) + 1
    return {
        "faults": sum(sum(verdict.faults.values()) for verdict in every),
        "violations": len(violations),
        "violations_by_kind": kinds or "none",
        "requests": sum(verdict.asks for verdict in every),
        "tokens": sum(verdict.tokens for verdict in every),
        "resumes": sum(verdict.resumes for verdict in every),
        "recovery": [row for entries in ledgers.values() for row in recovery(entries)],
    }


def main() -> None:
    """Run the soak and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each fault comes")
    parser.add_argument("--arena", choices=ARENAS, help="only this one")
    parser.add_argument("--fault", default="", help="only faults whose name holds this")
    parser.add_argument("--folder", type=Path, help="keep the ledgers here")
    parser.add_argument(
        "--read", action="store_true", help="inject nothing; judge the ledgers in the folder again"
    )
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak"))
    folder.mkdir(parents=True, exist_ok=True)
    ledgers: dict[str, list[Entry]] = {}
    for name in [options.arena] if options.arena else ARENAS:
        if options.read:
            lines = (folder / f"{name}.jsonl").read_text().splitlines()
            ledgers[name] = [json.loads(line) for line in lines]
            continue
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            ledgers[name] = runner.run(soak(name, options, folder))
    verdicts = {name: check(entries) for name, entries in ledgers.items()}
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    print(f"ledgers: {folder}")
    if not options.dry:
        times = [entry["t"] for entries in ledgers.values() for entry in entries]
        save(figures(verdicts, ledgers) | {"seconds": max(times) - min(times)})


def save(found: dict[str, Any]) -> None:
    """Write the result and the headline figures."""
    print(f"written: {write_result('soak', found)}")
    for name, value in (
        ("faults_injected", found["faults"]),
        ("faults_violations", found["violations"]),
    ):
        write_headline(name, value, "count", (value, value))


if __name__ == "__main__":
    main()
