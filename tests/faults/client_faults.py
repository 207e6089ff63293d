"""Faults of callers: they cancel in storms, vanish, ask for too much, or talk nonsense."""

import asyncio
import random
import signal
from collections.abc import Sequence

from benchmarks.processes import Child

from .arena import Arena, Fault, ProcessArena
from .fuzz import GATEWAY, Method, fuzz

STORM = 250
STORM_WIDTH = 64
VANISHING = 24
OVERLOAD_SECONDS = 2.0
OVERLOAD_ASKS = 240
"""A second. The stub arena answers about 120: 72 slots of 100 tokens/s, 60 tokens an ask."""
FUZZED = 1000


async def cancel_storm(arena: Arena) -> str:
    """Asks that are given up within milliseconds, many at a time."""
    draw = random.Random(arena.random.random())
    left = iter(range(STORM))

    async def cancels() -> int:
        gone = 0
        for _ in left:
            gone += await arena.callers.give_up(arena.pool(draw), draw.expovariate(50))
        return gone

    counts = await asyncio.gather(*(cancels() for _ in range(STORM_WIDTH)))
    return f"{sum(counts)} asks given up" if sum(counts) > STORM / 2 else ""


async def vanish(arena: Arena) -> str:
    """A client process with open streams is killed."""
    child = await Child.start(
        "tests.faults.vanishing_client", arena.address, "--streams", str(VANISHING)
    )
    before = sum(each.open_requests for each in (await arena.workers()).values())
    child.signal(signal.SIGKILL)
    await child.ended()

    async def gone() -> bool:
        now = sum(each.open_requests for each in (await arena.workers()).values())
        return now <= before - VANISHING * 2 // 3

    return f"{VANISHING} streams of a dead client were let go" if await arena.until(gone) else ""


async def overload(arena: ProcessArena) -> str:
    """Twice the asks that the fleet can answer, whether or not it keeps up, for a while."""
    draw = random.Random(arena.random.random())
    before = await arena.fleet()
    asks: list[asyncio.Task[bool]] = []
    waited = 0
    for index in range(round(OVERLOAD_SECONDS * OVERLOAD_ASKS)):
        asks.append(asyncio.create_task(arena.callers.ask(arena.pool(draw))))
        await asyncio.sleep(1 / OVERLOAD_ASKS)
        if index % 50 == 0:
            waited = max(waited, await _waiting(arena))
    await asyncio.gather(*asks)
    refused = (await arena.fleet()).rejections - before.rejections
    return f"{waited} waited at once, {refused} were refused" if waited or refused else ""


async def babble(arena: Arena) -> str:
    """Messages that make no sense, and bytes that are no message, to every method."""
    return await talk_nonsense(arena, arena.address, GATEWAY)


async def talk_nonsense(arena: Arena, address: str, targets: Sequence[Method]) -> str:
    """Nonsense for one server; what is answered improperly goes into the ledger."""
    outcome = await fuzz(address, FUZZED, arena.random.randrange(2**32), targets)
    for method, answer in outcome.wrong:
        arena.ledger.note("improper", method=method, answer=answer)
    return f"{outcome.sent} messages: {dict(outcome.codes)}"


async def _waiting(arena: ProcessArena) -> int:
    """Asks that wait, at the gateway or at its workers."""
    fleet = await arena.fleet()
    loads = await asyncio.gather(
        *(arena.load(place.child.address) for place in arena.places.values())
    )
    return fleet.queued_requests + sum(load.waiting_sequences for load in loads)


FAULTS = (
    Fault("cancel storm", cancel_storm),
    Fault("vanish", vanish),
    Fault("overload", overload, allows=("RESOURCE_EXHAUSTED",)),
    Fault("babble", babble),
)
