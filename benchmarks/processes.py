"""Child processes that are spoken to by JSON lines: stub workers, and a gateway before them."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
START_SECONDS = 90.0
SHORT_SECONDS = 20.0
_IMPORTABLE = os.pathsep.join([str(ROOT / ".root"), str(ROOT)])


class Child:
    """A process that has said one JSON line and obeys others; it ends when its input is closed."""

    def __init__(self, process: asyncio.subprocess.Process, hello: dict[str, Any]) -> None:
        self.hello = hello
        self.pid = process.pid
        self._process = process
        self._talking = asyncio.Lock()

    @classmethod
    async def start(cls, module: str, *arguments: str) -> Self:
        """Starts `python -m MODULE` and waits for its first line."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            stdin=PIPE,
            stdout=PIPE,
            cwd=ROOT,
            env={"GRPC_VERBOSITY": "ERROR", **os.environ, "PYTHONPATH": _IMPORTABLE},
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
        if not line:
            raise RuntimeError(f"{module} ended before it served; its messages stand above")
        return cls(process, json.loads(line))

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self.hello["address"])

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.returncode is None

    async def tell(self, **command: Any) -> dict[str, Any]:
        """Sends one control line and waits for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        async with self._talking:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            line = await asyncio.wait_for(self._process.stdout.readline(), SHORT_SECONDS)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def signal(self, number: signal.Signals) -> None:
        """Sends the process a signal, if it still runs."""
        if self.alive:
            self._process.send_signal(number)

    async def ended(self) -> None:
        """Waits until the process is gone."""
        await self._process.wait()

    async def stop(self) -> None:
        """Lets it end by itself, or ends it after a while."""
        assert self._process.stdin is not None
        self.signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), SHORT_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def start_worker(name: str, **settings: Any) -> Child:
    """A stub worker; `settings` are fields of stub_machine.Settings."""
    options = [f"--name={name}"]
    for key, value in settings.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        options.append(f"--{key.replace('_', '-')}={text}")
    return await Child.start("benchmarks.stub_worker", *options)


async def start_gateway(**config: Any) -> Child:
    """A gateway; `config` are fields of GatewayConfig."""
    text = json.dumps({"port": 0, **config})
    return await Child.start("benchmarks.gateway_process", "--config", text)


async def introduce(gateway: Child, name: str, worker: Child, address: str = "") -> None:
    """Tells a gateway where a worker is; `address` if something stands before it."""
    where = address or worker.address
    await gateway.tell(located=[name, where, worker.hello["incarnation"], worker.pid])
