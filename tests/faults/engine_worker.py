"""A real worker, with its engine and its gRPC server, in a process without Ray, to be broken.

Speaks as benchmarks/stub_worker.py does: one JSON line with its address, then it obeys lines:

    {"raise": 1}    the model raises in the next so many steps
    {"nan": 1}      the model's logits are NaN in the next so many steps

The faults are put between the engine and its model's `forward`, so that everything around the model
is what runs in earnest. Its pool of blocks is small: long answers at once run out of it.
"""

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.stub_worker import input_lines
from conclave.worker.config import EngineConfig, WorkerConfig
from conclave.worker.serving.server import WorkerServer

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "debian-8m"


class BrokenRunner:
    """The model's runner, but for the steps that are to break."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.raising = 0
        self.poisoned = 0
        self.hit = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, chunks: Any, *rest: Any, **more: Any) -> Any:
        """One step."""
        if self.raising:
            self.raising -= 1
            self.hit += len(chunks)
            raise RuntimeError("injected")
        logits = self._runner.forward(chunks, *rest, **more)
        if self.poisoned:
            self.poisoned -= 1
            self.hit += len(chunks)
            return logits * float("nan")
        return logits


async def obey(server: WorkerServer, runner: BrokenRunner) -> None:
    """Until the input ends."""
    async for line in input_lines():
        command = json.loads(line)
        runner.hit = 0
        runner.raising += command.get("raise", 0)
        runner.poisoned += command.get("nan", 0)
        while runner.raising or runner.poisoned:
            await asyncio.sleep(0.005)
        print(json.dumps({"done": sorted(command), "hit": runner.hit}), flush=True)


def main() -> None:
    """Run one worker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--kv-tokens", type=int, default=1024)
    options = parser.parse_args()
    engine = EngineConfig(
        model=MODEL,
        device="cpu",
        threads=1,
        max_sequences=12,
        kv_tokens=options.kv_tokens,
        max_context=256,
    )
    server = WorkerServer(
        WorkerConfig(name=options.name, engine=engine), on_broken=lambda: os._exit(1)
    )
    model: Any = server.engine.model
    runner = BrokenRunner(model.runner)
    object.__setattr__(model, "runner", runner)
    hello = {"address": server.address, "incarnation": server.incarnation}
    print(json.dumps(hello), flush=True)
    uvloop.run(obey(server, runner))
    server.stop()


if __name__ == "__main__":
    main()
