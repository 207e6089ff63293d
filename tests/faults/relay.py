"""A TCP port in front of another: it can break its connections, or swallow all that comes."""

import asyncio
import contextlib
from typing import Self


class Relay:
    """Carries bytes to `target`, a host:port, until it is told otherwise."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self.address = ""

    @classmethod
    async def to(cls, target: str) -> Self:
        """A relay that listens."""
        relay = cls(target)
        relay._server = await asyncio.start_server(relay._join, "127.0.0.1", 0)
        relay.address = f"127.0.0.1:{relay._server.sockets[0].getsockname()[1]}"
        return relay

    def cut(self) -> int:
        """Resets every connection; how many there were."""
        count = len(self._open) // 2
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()
        return count

    def swallow(self, on: bool) -> None:
        """Holds everything back without closing anything, as a broken network does."""
        self._flows.clear() if on else self._flows.set()

    def close(self) -> None:
        """Resets every connection and takes no new one."""
        assert self._server is not None
        self._server.close()
        self._flows.set()
        self.cut()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flows.wait()
        host, _, port = self._target.rpartition(":")
        try:
            back_reader, back_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back_writer}
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pump(reader, back_writer))
            group.create_task(self._pump(back_reader, writer))
        self._open -= {writer, back_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flows.wait()
                if writer.is_closing():
                    break
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
