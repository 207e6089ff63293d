"""A gateway and its workers, each in a process of its own, in which things may be broken.

Nobody mends anything by hand here: `_keep` does for the stub and engine workers what Ray does for
actors, it starts a process again that has died, and tells the gateway where it is.
"""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

import grpc
import grpc.aio

from benchmarks.processes import Child, introduce, start_gateway, start_worker
from benchmarks.stub_machine import WEIGHTS, truth
from conclave.protos import gateway_pb2, worker_pb2
from conclave.protos import generation_pb2 as pb
from conclave.protos.gateway_pb2_grpc import GatewayServiceStub
from conclave.protos.worker_pb2_grpc import WorkerServiceStub

from .crowd import Callers, Crowd, Pool, mixture
from .ledger import Ledger
from .relay import Relay

HEAL_SECONDS = 30.0
REST_SECONDS = 10.0
SERVING = gateway_pb2.WORKER_STATE_SERVING
Start = Callable[[str], Awaitable[Child]]


class Arena:
    """What every fault needs: callers, the gateway's view, and each worker's own word."""

    heal_seconds = HEAL_SECONDS
    """After which a fault counts as not healed."""
    metadata: tuple[tuple[str, str], ...] = ()
    """What the workers want to be shown."""

    def __init__(self, ledger: Ledger, address: str, pool: Pool) -> None:
        self.ledger = ledger
        self.address = address
        self.pool = pool
        self.random = random.Random(7)
        self.stack = AsyncExitStack()
        self._channel = grpc.aio.insecure_channel(address, [("grpc.max_reconnect_backoff_ms", 500)])
        self.front: Any = GatewayServiceStub(self._channel)
        self.callers = Callers(self.front, ledger, self.truths)
        self._faults = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self._channel.close(None)
        await self.stack.aclose()

    def truths(self, request: pb.GenerateRequest) -> Mapping[int, Sequence[int]] | None:
        """What the outputs of a request must become."""
        return None

    async def workers(self) -> dict[str, gateway_pb2.WorkerInfo]:
        """Every worker as the gateway sees it."""
        answer = await self.front.ListWorkers(
            gateway_pb2.ListWorkersRequest(), timeout=5.0, wait_for_ready=True
        )
        return {worker.name: worker for worker in answer.workers}

    async def fleet(self) -> gateway_pb2.GetFleetResponse:
        """The gateway's own counts."""
        answer: gateway_pb2.GetFleetResponse = await self.front.GetFleet(
            gateway_pb2.GetFleetRequest(), timeout=5.0, wait_for_ready=True
        )
        return answer

    async def load(self, address: str) -> worker_pb2.GetLoadResponse:
        """A worker's own word, asked past the gateway."""
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = WorkerServiceStub(channel)
            answer: worker_pb2.GetLoadResponse = await stub.GetLoad(
                worker_pb2.GetLoadRequest(),
                timeout=5.0,
                wait_for_ready=True,
                metadata=self.metadata,
            )
            return answer

    async def until(self, holds: Callable[[], Awaitable[Any]], seconds: float | None = None) -> Any:
        """Waits for something to be true and returns it; None if it does not become so."""
        deadline = time.monotonic() + (self.heal_seconds if seconds is None else seconds)
        while time.monotonic() < deadline:
            try:
                if found := await holds():
                    return found
            except grpc.aio.AioRpcError:
                pass  # it may be down just now; that is what this waits for
            await asyncio.sleep(0.05)
        return None

    async def everyone_serves(self) -> bool:
        """Whether all workers that there shall be take asks, and the fleet with them."""
        workers = await self.workers()
        return bool(workers) and all(
            each.state == SERVING and not each.broken for each in workers.values()
        )

    async def seen(self, name: str, state: "gateway_pb2.WorkerState", seconds: float = 5.0) -> bool:
        """Waits until the gateway sees a worker in a state."""

        async def is_so() -> bool:
            return (await self.workers())[name].state == state

        return bool(await self.until(is_so, seconds))

    async def note_rest(self) -> None:
        """Writes down what is still held, after all had time to let go."""
        await self.until(self._at_rest, REST_SECONDS)
        for name, worker in (await self.workers()).items():
            if worker.state != SERVING:
                continue  # that it is not healed stands in the ledger already
            load = await self.load(worker.address)
            self.ledger.note(
                "rest",
                worker=name,
                running=load.running_sequences,
                waiting=load.waiting_sequences,
                blocks=sum(pool.used for pool in load.pools),
                open=worker.open_requests,
            )

    async def _at_rest(self) -> bool:
        for worker in (await self.workers()).values():
            if worker.state != SERVING:
                continue
            load = await self.load(worker.address)
            used = sum(pool.used for pool in load.pools)
            if worker.open_requests or load.running_sequences or load.waiting_sequences or used:
                return False
        return True

    async def round(self, fault: "Fault") -> None:
        """Injects one fault into the work of many callers, and writes down what comes of it."""
        self._faults += 1
        number = f"{type(self).__name__}.{self._faults}"
        crowd = Crowd(self.callers, self.pool, fault.callers, seed=self._faults)
        async with crowd.at_work():
            began = time.monotonic()
            self.ledger.note(
                "fault", fault=number, name=fault.name, target=fault.where, allows=fault.allows
            )
            evidence = await fault.inject(self)
            if evidence:
                self.ledger.note("effect", fault=number, evidence=evidence)
            if await self.until(self.everyone_serves):
                seconds = round(time.monotonic() - began, 3)
                self.ledger.note("healed", fault=number, seconds=seconds)
        await self.note_rest()


Inject = Callable[[Any], Awaitable[str]]
"""Breaks something in an arena, ends what does not end by itself, and says what one could see of
it; an empty text if nothing."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break things."""

    name: str
    inject: Inject
    where: str = "stub"
    """Which arena it needs: stub, engine or ray."""
    allows: tuple[str, ...] = ()
    """Codes that a caller may see because of it; for most faults none."""
    callers: int = 32


@dataclass(slots=True)
class Place:
    """Where one worker of a process arena lives."""

    name: str
    start: Start
    child: Child
    relay: Relay | None = None


class ProcessArena(Arena):
    """A gateway process and worker processes that this process keeps alive."""

    def __init__(self, ledger: Ledger, gateway: Child, pool: Pool) -> None:
        super().__init__(ledger, gateway.address, pool)
        self.gateway = gateway
        self.places: dict[str, Place] = {}
        self._settings: dict[str, Any] = {}
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    async def of(
        cls,
        ledger: Ledger,
        pool: Pool,
        starts: Mapping[str, Start],
        relayed: Sequence[str] = (),
        **settings: Any,
    ) -> Self:
        """A gateway before workers that serve; those in `relayed` behind a relay."""
        arena = cls(ledger, await start_gateway(**settings), pool)
        port = int(arena.gateway.address.rpartition(":")[2])
        arena._settings = {**settings, "port": port}
        children = await asyncio.gather(*(start(name) for name, start in starts.items()))
        for (name, start), child in zip(starts.items(), children, strict=True):
            place = arena.places[name] = Place(name, start, child)
            if name in relayed:
                place.relay = await Relay.to(child.address)
            await arena._introduce(place)
        arena._keeper = asyncio.create_task(arena._keep(), name="keeper")
        arena.stack.push_async_callback(arena._end)
        assert await arena.until(arena.everyone_serves), "the workers do not serve"
        return arena

    def pick(self) -> Place:
        """Some worker without a relay."""
        return self.random.choice([each for each in self.places.values() if each.relay is None])

    def relayed(self) -> Place:
        """The worker behind a relay."""
        return next(each for each in self.places.values() if each.relay is not None)

    async def busy(self, place: Place) -> None:
        """Waits until a worker has something to lose."""

        async def works() -> bool:
            return (await self.load(place.child.address)).running_sequences >= 2

        await self.until(works)

    async def restart_gateway(self) -> None:
        """Kills the gateway as the kernel would, and starts another one at its address."""
        self.gateway.signal(signal.SIGKILL)
        await self.gateway.ended()
        self.gateway = await start_gateway(**self._settings)
        for place in self.places.values():
            await self._introduce(place)

    async def _introduce(self, place: Place) -> None:
        address = "" if place.relay is None else place.relay.address
        await introduce(self.gateway, place.name, place.child, address)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            for place in self.places.values():
                if not place.child.alive:
                    await self._replace(place)

    async def _replace(self, place: Place) -> None:
        if place.relay is not None:
            place.relay.close()
        place.child = await place.start(place.name)
        if place.relay is not None:
            place.relay = await Relay.to(place.child.address)
        # A gateway that is just being restarted hears of the new process when it is back.
        if self.gateway.alive:
            await self._introduce(place)

    async def _end(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for place in self.places.values():
            if place.relay is not None:
                place.relay.close()
        children = [self.gateway, *(place.child for place in self.places.values())]
        await asyncio.gather(*(child.stop() for child in children))


STUB_PROMPTS = [pb.Prompt(text=f"prompt {number}") for number in range(40)]
WATCHFUL = {"hang_seconds": 1.5, "stuck_seconds": 1.5, "max_queued_requests": 100}
"""Settings of a gateway that finds out soon, and whose queue can be filled."""
STUB_SETTINGS = {"rate": 3000.0, "stream_rate": 100.0, "per_step": 2, "slots": 24}


class StubArena(ProcessArena):
    """Three stub workers of the same weights; the last one stands behind a relay."""

    @classmethod
    async def open(cls, ledger: Ledger, **settings: Any) -> Self:
        """All processes up and serving."""
        pool = mixture(STUB_PROMPTS, lengths=(1, 5, 40, 80, 160))
        starts = dict.fromkeys(("a", "b", "c"), _start_stub)
        return await cls.of(ledger, pool, starts, relayed=("c",), **WATCHFUL | settings)

    def truths(self, request: pb.GenerateRequest) -> Mapping[int, Sequence[int]]:
        """A stub's answers are known beforehand."""
        count = request.sampling.n if request.sampling.HasField("n") else 1
        return {output: truth(request, output, WEIGHTS) for output in range(count)}


async def _start_stub(name: str) -> Child:
    return await start_worker(name, **STUB_SETTINGS)
