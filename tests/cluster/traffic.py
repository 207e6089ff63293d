"""Callers that ask without a pause, and what became of every ask."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from conclave.orchestrator.client import AsyncClient, WorkerState
from conclave.protos import gateway_pb2, gateway_pb2_grpc

PROMPT = "Package: vim\nLanguage: en\n\n"


@dataclass
class Traffic:
    """Streams by a number of callers that may change."""

    client: AsyncClient
    tokens: int
    callers: int = 0
    answers: list[str] = field(default_factory=list)
    """The workers that gave them."""
    failures: list[str] = field(default_factory=list)

    async def call(self, number: int) -> None:
        """One caller; asks while there shall be as many as its number says."""
        while number < self.callers:
            stream = self.client.stream(PROMPT, max_tokens=self.tokens, ignore_eos=True, seed=1)
            deltas = 0
            try:
                async for delta in stream:
                    deltas += len(delta.tokens)
                self.answers.append(stream.completion.worker)
                if stream.completion.usage.completion_tokens != self.tokens:
                    self.failures.append(f"cut short after {deltas} tokens")
            except Exception as error:
                self.failures.append(repr(error))

    @asynccontextmanager
    async def flow(self, callers: int) -> AsyncIterator[list[asyncio.Task[None]]]:
        """So many callers for a while; waits for their last answers."""
        self.callers = callers
        tasks = [asyncio.ensure_future(self.call(number)) for number in range(callers)]
        try:
            yield tasks
        finally:
            self.callers = 0
            await asyncio.gather(*tasks)

    async def serving(self) -> dict[str, str]:
        """The workers that serve, with their incarnations."""
        workers = await self.client.workers()
        return {w.name: w.incarnation for w in workers if w.state is WorkerState.SERVING}


def counters(address: str) -> gateway_pb2.GetFleetResponse:
    """What a gateway has counted."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)
        answer: gateway_pb2.GetFleetResponse = stub.GetFleet(gateway_pb2.GetFleetRequest())
        return answer
