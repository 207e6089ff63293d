"""What does an ensemble cost in time, and what does a hedge save?

Stub workers stand for members of known speed, so that what is measured is the orchestrator's own:
`fuse` over three equal members against the slowest of their steps; first tokens with and without
hedging while one member in three is ten times slower, in turns; a vote while one member is stopped.
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


def main() -> None:
    """Run all measurements and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15, help="answers of each kind for fuse")
    parser.add_argument("--asks", type=int, default=1000, help="asks of each kind for hedge")
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
        "hedge": await hedge_gain(options.asks),
        "vote": await vote_at_quorum(),
    }


async def fuse_cost(runs: int) -> dict[str, Any]:
    """Milliseconds a token: one member alone, three fused, and the slowest of their steps.

    The overhead is what a fused token takes over that step as the stubs themselves have timed it:
    with five processes on two cores a sleep of 10 ms ends late, the latest of three later still,
    and the gateway can do nothing about it. A member alone catches up with its own schedule.
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
    overheads = [a - b for a, b in zip(times["fused"], times["slowest"], strict=True)]
    return {
        **{f"{name}_ms": median(values) for name, values in times.items()},
        "over_alone_ms": median(times["fused"]) - median(times["alone"]),
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


async def hedge_gain(asks: int) -> dict[str, Any]:
    """Seconds to the first token, asked in turn with and without a hedge."""
    times: dict[str, list[float]] = {"single": [], "hedged": []}
    settings = {"first_token": FIRST_TOKEN, "stream_rate": 1000.0, "rate": 1e6}
    specs: dict[str, dict[str, object]] = {
        "single": {"single": {}},
        "hedged": {"hedge": {"quantile": 0.9}},
    }
    async with AsyncExitStack() as stack:
        rig = await Rig.start(stack, [settings] * 3)
        await rig.workers[0].tell(slowdown=SLOW)

        async def one(kind: str, number: int) -> None:
            began = time.perf_counter()
            stream = rig.client.stream(
                f"prompt {number}", ensemble=specs[kind], max_tokens=4, ignore_eos=True
            )
            async for _ in stream:
                times[kind].append(time.perf_counter() - began)
                break
            async for _ in stream:
                pass

        async with asyncio.TaskGroup() as group:
            for number in track(range(asks), "hedge"):
                for kind in specs:
                    group.create_task(one(kind, number))
                    await asyncio.sleep(0.01)
        hedges = (await rig.client.fleet()).hedges
    cut = quantiles(times["single"], n=100), quantiles(times["hedged"], n=100)
    halves = [
        1
        - quantiles(times["hedged"][half::2], n=100)[-1]
        / quantiles(times["single"][half::2], n=100)[-1]
        for half in (0, 1)
    ]
    return {
        "single_p50": cut[0][49],
        "single_p99": cut[0][98],
        "hedged_p50": cut[1][49],
        "hedged_p99": cut[1][98],
        "p99_cut": 1 - cut[1][98] / cut[0][98],
        "low": min(halves),
        "high": max(halves),
        "hedged_share": hedges / asks,
    }


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
