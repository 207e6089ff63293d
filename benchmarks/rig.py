"""A gateway and stub workers as processes, and what all benchmarks of them need."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

from conclave.orchestrator.client import AsyncClient

from .processes import Child, introduce, start_gateway, start_worker


@dataclass
class Rig:
    """Everything that runs; ends with its stack."""

    gateway: Child
    workers: list[Child]
    client: AsyncClient

    @classmethod
    async def start(
        cls, stack: AsyncExitStack, workers: Sequence[dict[str, Any]], **config: Any
    ) -> Self:
        """A gateway with that configuration before workers with those settings, all serving."""
        gateway = await start_gateway(**config)
        stack.push_async_callback(gateway.stop)
        children = []
        for index, settings in enumerate(workers):
            child = await start_worker(f"w{index}", **settings)
            stack.push_async_callback(child.stop)
            await introduce(gateway, f"w{index}", child)
            children.append(child)
        client = await stack.enter_async_context(AsyncClient(gateway.address, timeout=60.0))
        while (await client.fleet()).serving_workers < len(workers):
            await asyncio.sleep(0.05)
        return cls(gateway, children, client)
