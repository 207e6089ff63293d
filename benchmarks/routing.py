"""Does work go where it is done soonest, and what happens when there is too much of it?

Stub workers with capacities of 1:2:4 under a closed load: goodput over the sum of what they can do.
Then open load at twice what the fleet can do, with deadlines: tokens of answers that came in time
over capacity, and what the rejected ones were told. Goodput counts whole answers only.
Last, prompts that share long beginnings, more of them than one worker holds: what prefix affinity
saves, and what it does to the slowest first tokens when most ask for one of them, or when there are
more than all workers hold together.
"""

import argparse
import asyncio
import random
import string
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from conclave.orchestrator.client import ConclaveError, DeadlineExceeded, Overloaded, Select

from .records import write_headline, write_result
from .rig import Rig
from .stub_machine import TOKEN_BYTES

CAPACITIES = (250.0, 500.0, 1000.0)
CALLERS = 48
TOKENS = 32
OVERLOAD = 2.0
DEADLINE = 4.0
CAPACITY = 1000.0
"""Of each of the two workers under overload."""
BEGINNING_TOKENS, QUESTION_TOKENS = 1024, 64
SHARING = {
    "rate": 400.0,
    "stream_rate": 50.0,
    "slots": 16,
    "prefill_rate": 4000.0,
    "cache_blocks": 800,
}
"""Three workers like this one; it holds 12 of the beginnings, less the questions in its cache."""
AFFINITIES = ("off", "on", "always")
"""The gateway's setting; or the caller names one worker for each beginning, whatever its load."""
GOOD_FIRST_TOKEN = 0.5
"""Seconds within which the first token must come for an answer to count as good."""


@dataclass(frozen=True)
class Load:
    """Asks whose prompts share their beginnings."""

    beginnings: int
    asks_a_second: float
    popular: float = 0.0
    """Share of the asks that begin alike; the rest is even."""


LOADS = {
    "even": Load(beginnings=24, asks_a_second=16.0),
    "skewed": Load(beginnings=24, asks_a_second=20.0, popular=0.6),
    "crowded": Load(beginnings=96, asks_a_second=9.0),
}


def main() -> None:
    """Run all measurements and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    figures = asyncio.run(measure(options.seconds, options.runs))
    for name, rows in figures.items():
        for row in rows:
            print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    if not options.dry:
        save(figures)


async def measure(seconds: float, runs: int) -> dict[str, list[dict[str, Any]]]:
    """All figures, one after the other."""
    return {
        "unequal": [await unequal(seconds) for _ in range(runs)],
        "overload": [await overload(seconds) for _ in range(runs)],
        "affinity": await affinity(2 * seconds, runs),
    }


@dataclass
class Count:
    """What came of the asks."""

    good: int = 0
    """Tokens of whole answers."""
    answered: int = 0
    rejected: int = 0
    late: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)
    retry_after: list[float] = field(default_factory=list)

    async def ask(self, rig: Rig, number: int, **options: Any) -> None:
        """One ask; what became of it is counted."""
        began = time.perf_counter()
        try:
            answer = await rig.client.generate(
                f"prompt {number}", max_tokens=TOKENS, ignore_eos=True, **options
            )
        except Overloaded as error:
            self.rejected += 1
            self.retry_after.append(error.retry_after)
        except DeadlineExceeded:
            self.late += 1
        except ConclaveError:
            self.failed += 1
        else:
            self.answered += 1
            self.good += answer.usage.completion_tokens
            self.seconds.append(time.perf_counter() - began)


async def unequal(seconds: float) -> dict[str, Any]:
    """A closed load on workers of 1:2:4; counted after a fifth of the time."""
    async with AsyncExitStack() as stack:
        workers = [{"rate": rate, "stream_rate": 200.0} for rate in CAPACITIES]
        rig = await Rig.start(stack, workers)
        count, warm = Count(), Count()
        began = time.perf_counter()
        start, end = began + seconds / 5, began + seconds

        async def caller(number: int) -> None:
            while (now := time.perf_counter()) < end:
                await (count if now >= start else warm).ask(rig, number)

        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(caller(number))
        took = time.perf_counter() - start
        served = [worker.served_requests for worker in await rig.client.workers()]
    assert not count.failed and not count.rejected
    rate = count.good / took
    return {
        "capacity": sum(CAPACITIES),
        "goodput": rate,
        "fraction": rate / sum(CAPACITIES),
        "served": " : ".join(map(str, served)),
    }


async def overload(seconds: float) -> dict[str, Any]:
    """Twice as many asks as can be answered, evenly in time, each with a deadline."""
    async with AsyncExitStack() as stack:
        workers = [{"rate": CAPACITY, "stream_rate": 100.0, "slots": 16}] * 2
        rig = await Rig.start(stack, workers)
        count, capacity = Count(), CAPACITY * len(workers)
        pause = TOKENS / (OVERLOAD * capacity)
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(int(seconds / pause)):
                await asyncio.sleep(max(0.0, began + number * pause - time.perf_counter()))
                group.create_task(count.ask(rig, number, timeout=DEADLINE))
        took = time.perf_counter() - began
    rate = count.good / took
    return {
        "capacity": capacity,
        "goodput": rate,
        "fraction": rate / capacity,
        "answered": count.answered,
        "rejected": count.rejected,
        "late": count.late,
        "failed": count.failed,
        "p99_s": quantiles(count.seconds, n=100)[-1],
        "retry_after_s": sum(count.retry_after) / max(1, len(count.retry_after)),
    }


async def affinity(seconds: float, runs: int) -> list[dict[str, Any]]:
    """Each load with each kind of affinity, in turns; medians, and the range of the worst."""
    rows = []
    for name, load in LOADS.items():
        shared: dict[str, list[Shared]] = {kind: [] for kind in AFFINITIES}
        for run in range(runs):
            for kind in AFFINITIES:
                shared[kind].append(await sharing(seconds, load, kind, run))
        for kind, each in shared.items():
            p50s, p99s = zip(*(one.percentiles_ms() for one in each), strict=True)
            rows.append(
                {
                    "load": name,
                    "affinity": kind,
                    "cached": median(one.cached / one.prompts for one in each),
                    "first_p50_ms": median(p50s),
                    "first_p99_ms": median(p99s),
                    "p99_range_ms": f"{min(p99s):.0f} to {max(p99s):.0f}",
                    "goodput": median(one.good for one in each) / (seconds * 0.8),
                    "asked_for": median(len(one.firsts) * TOKENS for one in each) / (seconds * 0.8),
                }
            )
    return rows


@dataclass
class Shared:
    """What came of asks with shared beginnings."""

    firsts: list[float] = field(default_factory=list)
    """Seconds to each first token."""
    prompts: int = 0
    """Their tokens."""
    cached: int = 0
    good: int = 0

    async def ask(self, rig: Rig, prompt: str, **options: Any) -> None:
        """One ask; what became of it is counted."""
        began = time.perf_counter()
        stream = rig.client.stream(prompt, max_tokens=TOKENS, ignore_eos=True, **options)
        await anext(stream)
        first = time.perf_counter() - began
        async for _ in stream:
            pass
        usage = stream.completion.usage
        self.firsts.append(first)
        self.prompts += usage.prompt_tokens
        self.cached += usage.cached_tokens
        self.good += usage.completion_tokens * (first <= GOOD_FIRST_TOKEN)

    def percentiles_ms(self) -> tuple[float, float]:
        """The 50th and the 99th of the first tokens' times."""
        cuts = quantiles(self.firsts, n=100)
        return cuts[49] * 1e3, cuts[98] * 1e3


async def sharing(seconds: float, load: Load, kind: str, run: int) -> Shared:
    """Open load at random times, the same ones for each kind; counted after a fifth of the time."""
    draw = random.Random(run)
    beginnings = [_text(draw, BEGINNING_TOKENS) for _ in range(load.beginnings)]
    shared, warm = Shared(), Shared()
    async with AsyncExitStack() as stack:
        rig = await Rig.start(stack, [SHARING] * 3, prefix_affinity=kind == "on")
        began, due = time.perf_counter(), 0.0
        async with asyncio.TaskGroup() as group:
            while due < seconds:
                await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
                at = 0 if draw.random() < load.popular else draw.randrange(load.beginnings)
                options = {"select": Select([f"w{at % 3}"])} if kind == "always" else {}
                prompt = beginnings[at] + _text(draw, QUESTION_TOKENS)
                count = shared if due >= seconds / 5 else warm
                group.create_task(count.ask(rig, prompt, **options))
                due += draw.expovariate(load.asks_a_second)
    return shared


def _text(draw: random.Random, tokens: int) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=tokens * TOKEN_BYTES))


def save(figures: dict[str, list[dict[str, Any]]]) -> None:
    """Write the result and the headline figures that this script owns."""
    print(f"written: {write_result('routing', figures)}")
    for headline, name in (("hetero_goodput", "unequal"), ("overload_goodput", "overload")):
        fractions = sorted(row["fraction"] for row in figures[name])
        value = fractions[len(fractions) // 2]
        write_headline(headline, value, "fraction", (fractions[0], fractions[-1]))


if __name__ == "__main__":
    main()
