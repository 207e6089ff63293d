"""Faults of one worker: it dies, hangs, crawls, breaks inside, loses its line, or is drained."""

import asyncio
import signal

import grpc.aio

from conclave.protos import gateway_pb2, worker_pb2
from conclave.protos.worker_pb2_grpc import WorkerServiceStub

from .arena import Fault, Place, ProcessArena

HANG_SECONDS = 4.0
"""Longer than the gateway needs to miss a worker's heartbeat."""
SLOW_SECONDS = 1.5
SLOWDOWN = 10
DOWN = gateway_pb2.WORKER_STATE_DOWN
DRAINING = gateway_pb2.WORKER_STATE_DRAINING


async def kill(arena: ProcessArena) -> str:
    """SIGKILL; the keeper starts a new process."""
    place = arena.pick()
    await arena.busy(place)
    before = place.child.hello["incarnation"]
    place.child.signal(signal.SIGKILL)

    async def is_new() -> bool:
        found = (await arena.workers())[place.name]
        return found.incarnation not in ("", before) and found.restarts > 0

    return f"{place.name} has a new incarnation" if await arena.until(is_new) else ""


async def hang(arena: ProcessArena) -> str:
    """SIGSTOP: its sockets stay open, and nothing comes."""
    place = arena.pick()
    await arena.busy(place)
    place.child.signal(signal.SIGSTOP)
    try:
        return await _seen_down(arena, place)
    finally:
        place.child.signal(signal.SIGCONT)


async def stall(arena: ProcessArena) -> str:
    """The engine stands still while the process still answers."""
    place = arena.pick()
    await arena.busy(place)
    await place.child.tell(stall=True)
    try:
        return await _seen_down(arena, place)
    finally:
        await place.child.tell(stall=False)


async def partition(arena: ProcessArena) -> str:
    """The network swallows everything, without a word to either side."""
    place = arena.relayed()
    assert place.relay is not None
    await arena.busy(place)
    place.relay.swallow(True)
    try:
        return await _seen_down(arena, place)
    finally:
        place.relay.swallow(False)


async def drop(arena: ProcessArena) -> str:
    """The connection is reset; both processes live."""
    place = arena.relayed()
    assert place.relay is not None
    await arena.busy(place)
    count = place.relay.cut()
    return f"{count} connections reset" if count else ""


async def slow(arena: ProcessArena) -> str:
    """Every step takes ten times as long, for a while."""
    place = arena.pick()
    await arena.busy(place)
    usual = await _pace(arena, place)
    await place.child.tell(slowdown=SLOWDOWN)
    try:
        slowed = await _pace(arena, place)
    finally:
        await place.child.tell(slowdown=1.0)
    return f"{usual:.0f} steps/s became {slowed:.0f}" if slowed < usual / 3 else ""


async def raises(arena: ProcessArena) -> str:
    """The model raises inside a step."""
    return await _fail(arena, "the model failed: injected")


async def makes_nan(arena: ProcessArena) -> str:
    """The model makes NaN logits."""
    return await _fail(arena, "the model produced NaN; its weights or kernels are broken")


async def drain(arena: ProcessArena) -> str:
    """Drained with less time than its longest answers need, then ended and replaced."""
    place = arena.pick()
    await arena.busy(place)
    async with grpc.aio.insecure_channel(place.child.address) as channel:
        call = WorkerServiceStub(channel).Drain(worker_pb2.DrainRequest(grace_seconds=0.5))
        draining = await arena.seen(place.name, DRAINING)
        done = await call
    place.child.signal(signal.SIGTERM)
    await place.child.ended()
    return f"{done.completed} asks ended, {done.aborted} aborted" if draining else ""


async def _seen_down(arena: ProcessArena, place: Place) -> str:
    loop = asyncio.get_running_loop()
    began = loop.time()
    if not await arena.seen(place.name, DOWN, HANG_SECONDS):
        return ""
    return f"{place.name} was seen to be down after {loop.time() - began:.2f} s"


async def _pace(arena: ProcessArena, place: Place) -> float:
    before = (await arena.load(place.child.address)).steps
    await asyncio.sleep(SLOW_SECONDS / 2)
    return ((await arena.load(place.child.address)).steps - before) / (SLOW_SECONDS / 2)


async def _fail(arena: ProcessArena, message: str) -> str:
    place = arena.pick()
    await arena.busy(place)
    hit = (await place.child.tell(fail=message))["hit"]
    return f"{hit} requests were running" if hit else ""


FAULTS = (
    Fault("kill", kill),
    Fault("hang", hang),
    Fault("stall", stall),
    Fault("slow", slow),
    Fault("raise", raises),
    Fault("nan", makes_nan),
    Fault("drop", drop),
    Fault("partition", partition),
    Fault("drain", drain),
)
