"""What does an ensemble cost in time, and what does a hedge save?

Stub workers stand for members of known speed, so that what is measured is the orchestrator's own:
`fuse` over three equal members against one of them alone, in turns; first tokens with and without
hedging while one member in three is ten times slower; a vote while one member is stopped.
"""

import argparse
import asyncio
import signal
import time
from contextlib import AsyncExitStack
from statistics import fmean, median, quantiles
from typing import Any

from rich.progress import track

from .records import write_headline, write_result
from .rig import Rig

STEP_RATE = 100.0
"""Tokens a second of one stream: a step of 10 ms."""
TOKENS = 64
FIRST_TOKEN = 0.05
SLOW = 10
PERIOD = 5.0
"""Seconds for which a member is the slow one."""
PERIODS = 6
"""That are counted; a third of them for each member."""
HEDGE_KINDS: tuple[dict[str, object], ...] = ({"single": {}}, {"hedge": {"quantile": 0.9}})


def main() -> None:
    """Run all measurements and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15, help="answers of each kind for fuse")
    parser.add_argument("--hedge-runs", type=int, default=3, help="of 35 s each")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    figures = asyncio.run(measure(options))
    for name, figure in figures.items():
        print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in figure.items()})
    if not options.dry:
        save(figures)


async def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All figures, one after the other."""
    return {
        "fuse": await fuse_cost(options.runs),
        "hedge": await hedge_gain(options.hedge_runs),
        "vote": await vote_at_quorum(),
    }


async def fuse_cost(runs: int) -> dict[str, Any]:
    """Milliseconds a token: one member alone, three fused, and the slowest of their steps.

    The overhead is what a fused token takes over one of a member alone. A simulated step that the
    machine has ended late is followed by a shorter one, in both (`stub_clock.Clock`), so that the
    sleeping is not counted as the gateway's; that one of three is always the latest still is.
    """
    times: dict[str, list[float]] = {"alone": [], "fused": [], "slowest": []}
    async with AsyncExitStack() as stack:
        rig = await Rig.start(stack, [{"stream_rate": STEP_RATE, "rate": 1e6}] * 3)
        kinds: dict[str, Any] = {"alone": {}, "fused": {"ensemble": {"fuse": {}, "count": 3}}}
        for run in track(range(-1, runs), "fuse"):
            for name, more in kinds.items():
                took = await milliseconds_a_token(rig, more)
                if run >= 0:
                    times[name].append(took)
            slowest = await slowest_step(rig)
            if run >= 0:
                times["slowest"].append(slowest)
    overheads = [a - b for a, b in zip(times["fused"], times["alone"], strict=True)]
    return {
        **{f"{name}_ms": median(values) for name, values in times.items()},
        "over_slowest_ms": median(times["fused"]) - median(times["slowest"]),
        "overhead_ms": median(overheads),
        "low": min(overheads),
        "high": max(overheads),
    }


async def slowest_step(rig: Rig) -> float:
    """Milliseconds that the slowest of the members needed for a step of the last answer."""
    answers = [await worker.tell(steps=True) for worker in rig.workers]
    together = zip(*(answer["steps"] for answer in answers), strict=False)  # the end cuts some off
    # The first opens the answer and the second makes the token from which the others are timed.
    return fmean([max(step) for step in list(together)[2:]]) * 1e3


async def milliseconds_a_token(rig: Rig, more: dict[str, Any]) -> float:
    """From the first token of a stream to its last."""
    stream = rig.client.stream(
        "a prompt", temperature=0.0, max_tokens=TOKENS, ignore_eos=True, **more
    )
    arrived: list[float] = []
    async for delta in stream:
        arrived += [time.perf_counter()] * len(delta.tokens)
    assert len(arrived) == TOKENS
    return (arrived[-1] - arrived[0]) * 1e3 / (TOKENS - 1)


async def hedge_gain(runs: int) -> dict[str, Any]:
    """Seconds to the first token with and without hedging, and how much the 99th percentile falls.

    Each kind has a fleet of its own, for what one learns of a slow member, and how long it keeps
    it busy, would change the other's times; both run at once, so that the machine is the same. At
    any time one member of three is ten times slower, after PERIOD seconds the next one: of a member
    that is slow for ever the router soon knows, and there is no tail left to cut. The first period
    of a run is not counted. `low` and `high` are over the halves of all runs, in time.
    """
    halves, cuts, rows = [], [], []
    for _ in track(range(runs), "hedge"):
        times, hedges = await hedge_run()
        single, hedged = times
        halves += [p99_cut(single[h], hedged[h]) for h in (0, 1)]
        whole = [[*kind[0], *kind[1]] for kind in times]
        cuts.append(p99_cut(*whole))
        share = hedges / len(whole[1])
        rows.append([quantiles(kind, n=100)[at] for kind in whole for at in (49, 98)] + [share])
    names = ("single_p50", "single_p99", "hedged_p50", "hedged_p99", "hedged_share")
    medians = [median(column) for column in zip(*rows, strict=True)]
    return {
        **dict(zip(names, medians, strict=True)),
        "p99_cut": median(cuts),
        "low": min(halves),
        "high": max(halves),
        "p99_cuts": [round(cut, 3) for cut in cuts],
        "hedged_shares": [round(row[-1], 3) for row in rows],
    }


def p99_cut(single: list[float], hedged: list[float]) -> float:
    """How much shorter the 99th percentile is, as a fraction."""
    return 1 - quantiles(hedged, n=100)[-1] / quantiles(single, n=100)[-1]


async def hedge_run() -> tuple[list[tuple[list[float], list[float]]], int]:
    """First-token times of both kinds, each by half of the run, and how many were hedged."""
    settings = {"first_token": FIRST_TOKEN, "stream_rate": 1000.0, "rate": 1e6}
    times: list[tuple[list[float], list[float]]] = [([], []), ([], [])]
    async with AsyncExitStack() as stack:
        rigs = [await Rig.start(stack, [settings] * 3) for _ in HEDGE_KINDS]

        async def ask(kind: int, half: int) -> None:
            began = time.perf_counter()
            stream = rigs[kind].client.stream(
                "a prompt", ensemble=HEDGE_KINDS[kind], max_tokens=4, ignore_eos=True
            )
            await anext(stream)
            took = time.perf_counter() - began
            if half >= 0:
                times[kind][half].append(took)
            async for _ in stream:
                pass

        hedges_before = 0
        async with asyncio.TaskGroup() as group:
            for period in range(1 + PERIODS):
                await asyncio.gather(*(slow_down(rig, period % 3) for rig in rigs))
                if period == 1:
                    hedges_before = (await rigs[1].client.fleet()).hedges
                half = -1 if period == 0 else int(period > PERIODS // 2)
                ends = time.perf_counter() + PERIOD
                while time.perf_counter() < ends:
                    for kind in range(len(HEDGE_KINDS)):
                        group.create_task(ask(kind, half))
                        await asyncio.sleep(0.01)
        hedges = (await rigs[1].client.fleet()).hedges - hedges_before
    return times, hedges


async def slow_down(rig: Rig, slow: int) -> None:
    """From now on this member is the slow one."""
    for number, worker in enumerate(rig.workers):
        await worker.tell(slowdown=SLOW if number == slow else 1)


async def vote_at_quorum() -> dict[str, Any]:
    """Seconds that a vote takes with its three members, and with one of them stopped."""
    async with AsyncExitStack() as stack:
        rig = await Rig.start(stack, [{"stream_rate": STEP_RATE, "rate": 1e6}] * 3)

        async def vote() -> float:
            began = time.perf_counter()
            spec = {"vote": {}, "count": 3, "quorum": 2}
            answer = await rig.client.generate(
                "a question", ensemble=spec, temperature=0.0, max_tokens=8, ignore_eos=True
            )
            assert answer.ensemble is not None
            return time.perf_counter() - began

        whole = [await vote() for _ in range(10)]
        rig.workers[2].signal(signal.SIGSTOP)
        stopped = [await vote() for _ in range(10)]
        rig.workers[2].signal(signal.SIGCONT)
    return {
        "all_there_s": median(whole),
        "one_stopped_s": median(stopped),
        "one_stopped_worst_s": max(stopped),
    }


def save(figures: dict[str, dict[str, Any]]) -> None:
    """Write the result and the headline figures that this script owns."""
    print(f"written: {write_result('ensemble_cost', figures)}")
    fuse, hedge = figures["fuse"], figures["hedge"]
    write_headline("fuse_overhead", fuse["overhead_ms"], "ms", (fuse["low"], fuse["high"]))
    write_headline("hedge_p99_cut", hedge["p99_cut"], "fraction", (hedge["low"], hedge["high"]))


if __name__ == "__main__":
    main()
