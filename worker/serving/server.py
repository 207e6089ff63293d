"""Life of a worker's gRPC server: load, listen, warm up, serve, drain, stop.

The server has a thread and an asyncio loop of its own, so that it works the same by hand, in a test
and inside a Ray actor, and never shares a loop with anything that may block.
"""

import asyncio
import logging
import secrets
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...protos import worker_pb2, worker_pb2_grpc
from ..address import local_name
from ..config import WorkerConfig
from ..engine import Engine
from ..loading import Progress
from .credentials import check_exposure, interceptors
from .service import WorkerService

log = logging.getLogger(__name__)

T = TypeVar("T")

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
_HEALTH_NAMES = ("", SERVICE)
_WATCH_SECONDS = 0.5


class WorkerServer:
    """One worker: an engine behind a gRPC server.

    Args:
        config: the worker's settings.
        progress: called with tensors loaded so far and in all.
        on_broken: called once if the engine dies under a running server.

    Raises:
        CheckpointError, ConfigError: the engine cannot be started, or anybody could call it.
        OSError: the address cannot be bound.
    """

    def __init__(
        self,
        config: WorkerConfig,
        progress: Progress | None = None,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        check_exposure(config)
        self.config = config
        self.incarnation = secrets.token_hex(8)
        """Tells this process from the one before it."""
        self.engine = Engine(config.engine, progress)
        self._on_broken = on_broken
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._thread.start()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        try:
            self.address: str = self._call(self._start()).result()
        except BaseException:
            self.engine.close()
            self._end_loop()
            raise
        self.engine.warm_up()
        self._call(self._open()).result()

    def drain(self, grace: float | None) -> tuple[int, int]:
        """Refuse new asks and wait for the open ones; see `WorkerService.drain`."""
        return self._call(self._service.drain(grace)).result()

    def stop(self, grace: float | None = 0.0) -> None:
        """Drain for at most `grace` seconds, then close the server and the engine."""
        if not self._thread.is_alive():
            return
        self.drain(grace)
        self._watch.cancel()
        self._call(self._server.stop(1.0)).result()
        self.engine.close()
        self._end_loop()

    def wait(self) -> None:
        """Block until the server has stopped."""
        self._thread.join()

    async def _start(self) -> str:
        limit = self.config.max_message_mib * 2**20
        self._server = grpc.aio.server(
            interceptors=interceptors(self.config),
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._service = WorkerService(
            self.engine, self.config, self.incarnation, self._close_health
        )
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = f"{self.config.listen_host}:{self.config.port}"
        try:
            port = self._server.add_insecure_port(address)
            self._listen_nearby(f"{self.config.listen_host}:{port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await self._server.start()
        return f"{self.config.listen_host}:{port}"

    def _listen_nearby(self, address: str) -> None:
        """Beside that address, where only this machine reaches; whoever may call is the same."""
        if sys.platform == "linux":
            self._server.add_insecure_port(f"unix-abstract:{local_name(address)}")

    async def _open(self) -> None:
        self._service.open_doors()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._watch = asyncio.get_running_loop().create_task(self._watch_engine())
        log.info("worker %s serves on %s", self.config.name, self.address)

    async def _watch_engine(self) -> None:
        while self.engine.alive:
            await asyncio.sleep(_WATCH_SECONDS)
        log.error("the engine of worker %s has died", self.config.name)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._on_broken()

    def _close_health(self) -> None:
        """Turn NOT_SERVING at once; called on the loop."""
        self._closing = self._loop.create_task(
            self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        )

    async def _set_health(self, status: int) -> None:
        for name in _HEALTH_NAMES:
            await self._health.set(name, status)

    def _call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
