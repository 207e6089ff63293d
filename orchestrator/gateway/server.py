"""The gateway: one grpc.aio server in front of all workers, and the lines to them.

It needs no Ray. Whoever knows where workers are (the supervisor, or a test) tells it with
`declare`, `located`, `starting` and `lost`; whether they serve, it hears from the workers
themselves. So the gateway can be tested, and used, with workers started in any other way.
"""

import asyncio
from collections.abc import Callable, Mapping

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...protos import gateway_pb2_grpc, worker_pb2
from ...worker.errors import ConfigError
from ..config import GatewayConfig
from ..lines.connection import Connection, channel_options
from ..routing.registry import Registry, Worker, WorkerState
from .dispatch import Dispatcher
from .service import SERVICE, GatewayService

SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]


class Gateway:
    """Start it, tell it of workers, stop it; all on one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        fleet: str = "fleet",
        changed: Callable[[Worker], None] | None = None,
    ) -> None:
        self.registry = Registry(self._worker_changed)
        self.address = ""
        """Where it listens, once started."""
        self._config = config
        self._fleet = fleet
        self._changed = changed
        self._connections: dict[str, Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._dispatcher = Dispatcher(self.registry, self._connections, config)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._health_due = asyncio.Event()
        self._health_task: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listens. Raises ConfigError if the address cannot be had."""
        options = channel_options(self._config.max_message_mib) + SERVER_OPTIONS
        self._server = server = grpc.aio.server(options=options)
        service = GatewayService(self._fleet, self.registry, self._dispatcher)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        await self._publish_health()
        self._health_task = asyncio.create_task(self._follow_health(), name="gateway health")
        wanted = f"{self._config.host}:{self._config.port}"
        try:
            port = server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {wanted}: choose another gateway.port") from error
        await server.start()
        self.address = f"{self._config.host}:{port}"

    async def stop(self, grace: float | None = None) -> None:
        """Refuses new asks, gives the running ones `grace` seconds, and lets go of the workers."""
        await self._health.enter_graceful_shutdown()
        if self._health_task is not None:
            self._health_task.cancel()
        if self._server is not None:
            await self._server.stop(self._config.grace_seconds if grace is None else grace)
        for name in list(self._connections):
            self._disconnect(name)
        await asyncio.gather(*self._closing)

    def declare(self, name: str, *, model: str = "", labels: Mapping[str, str] = {}) -> None:
        """The fleet shall have this worker; asks that need it may wait for it from now on."""
        self.registry.declare(name, model=model, labels=labels)

    def located(self, name: str, address: str, incarnation: str, process: int = 0) -> None:
        """A worker's process is at this address; a no-op if that is known."""
        if not self.registry.located(name, address, incarnation, process):
            return
        self._disconnect(name)
        size = self._config.max_message_mib
        connection = Connection(name, address, incarnation, size, listener=self)
        self._connections[name] = connection
        connection.open()

    def absent(self, name: str, reason: str) -> None:
        """Ray is about to start the worker; what its health stream says counts for more."""
        self.registry.starting(name, reason)

    def lost(self, name: str, reason: str) -> None:
        """The worker will not be started again."""
        self._disconnect(name)
        self.registry.down(name, reason, lost=True)

    def serving(self, connection: Connection, about: worker_pb2.DescribeResponse) -> None:
        """A worker's health stream says SERVING."""
        if self._connections.get(connection.name) is connection:
            self.registry.described(
                connection.name, model=about.model, device=about.device, labels=about.labels
            )
            self.registry.serving(connection.name)

    def draining(self, connection: Connection) -> None:
        """A worker's health stream says NOT_SERVING."""
        if self._connections.get(connection.name) is connection:
            self.registry.draining(connection.name)

    def unreachable(self, connection: Connection, reason: str) -> None:
        """A worker's health stream broke."""
        if self._connections.get(connection.name) is connection:
            self.registry.down(connection.name, reason)

    def _disconnect(self, name: str) -> None:
        connection = self._connections.pop(name, None)
        if connection is not None:
            task = asyncio.create_task(connection.close(), name=f"closing {name}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _worker_changed(self, worker: Worker) -> None:
        self._dispatcher.workers_changed()
        self._health_due.set()
        if self._changed is not None:
            self._changed(worker)

    async def _follow_health(self) -> None:
        while True:
            await self._health_due.wait()
            self._health_due.clear()
            await self._publish_health()

    async def _publish_health(self) -> None:
        workers = self.registry.workers.values()
        serves = any(worker.state is WorkerState.SERVING for worker in workers)
        answer = health_pb2.HealthCheckResponse
        status = answer.SERVING if serves else answer.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)
