"""The gateway: one grpc.aio server in front of all workers, and the lines to them.

It needs no Ray. Whoever knows where workers are (the supervisor, or a test) tells it with
`declare`, `located`, `starting` and `lost`; whether they serve, it hears from the workers
themselves. So the gateway can be tested, and used, with workers started in any other way.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...protos import gateway_pb2_grpc, worker_pb2
from ...worker.errors import ConfigError
from ..config import GatewayConfig
from ..lines.connection import Connection, Patience, channel_options
from ..precision import precision_of
from ..routing.registry import About, Beat, Registry, Worker, WorkerState
from ..security.certificates import server_credentials
from ..security.interceptor import interceptors
from ..security.settings import check_exposure
from .dispatch import Dispatcher
from .panels import Panels
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
        self._panels = Panels(self._dispatcher, config.presets(), config.hedge_share)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._health_due = asyncio.Event()
        self._health_task: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    @property
    def queued(self) -> int:
        """Asks that wait for a worker."""
        return self._dispatcher.admission.queued

    async def start(self) -> None:
        """Listens. Raises ConfigError if the address cannot be had."""
        options = channel_options(self._config.max_message_mib) + SERVER_OPTIONS
        security = self._config.security
        check_exposure(self._config.host, security)
        self._server = server = grpc.aio.server(
            interceptors=interceptors(security), options=options
        )
        service = GatewayService(self._fleet, self.registry, self._dispatcher, self._panels)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        await self._publish_health()
        self._health_task = asyncio.create_task(self._follow_health(), name="gateway health")
        wanted = f"{self._config.host}:{self._config.port}"
        try:
            if security.tls is not None:
                port = server.add_secure_port(wanted, server_credentials(security.tls))
            else:
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

    def located(
        self, name: str, address: str, incarnation: str, process: int = 0, secret: str = ""
    ) -> None:
        """A worker's process is at this address, and wants to be shown `secret`; a no-op if that
        is known."""
        if not self.registry.located(name, address, incarnation, process):
            return
        self._let_go(name)
        size = self._config.max_message_mib
        patience = Patience(self._config.hang_seconds, self._config.stuck_seconds)
        connection = Connection(name, address, incarnation, size, patience, self, secret)
        self._connections[name] = connection
        connection.open()

    def absent(self, name: str, reason: str) -> None:
        """Ray is about to start the worker; what its health stream says counts for more."""
        self.registry.starting(name, reason)

    def retire(self, name: str, reason: str) -> None:
        """The worker gets no new ask, and ends when the open ones have; another may follow it."""
        self._let_go(name)
        self.registry.down(name, reason)

    def forget(self, name: str) -> None:
        """The fleet no longer has this worker."""
        self._let_go(name)
        self.registry.forget(name)

    def lost(self, name: str, reason: str) -> None:
        """The worker will not be started again."""
        self._disconnect(name)
        self.registry.down(name, reason, lost=True)

    def serving(self, connection: Connection, about: worker_pb2.DescribeResponse) -> None:
        """A worker's health stream says SERVING."""
        if self._connections.get(connection.name) is connection:
            said = About(
                model=about.model,
                device=about.device,
                labels=dict(about.labels),
                weights=about.model_fingerprint,
                tokenizer=about.tokenizer_fingerprint,
                max_sequences=about.max_sequences,
                precision=precision_of(about),
            )
            self.registry.described(connection.name, said)
            self.registry.serving(connection.name)

    def draining(self, connection: Connection) -> None:
        """A worker's health stream says NOT_SERVING."""
        if self._connections.get(connection.name) is connection:
            self.registry.draining(connection.name)

    def unreachable(self, connection: Connection, reason: str) -> None:
        """A worker's health stream broke."""
        if self._connections.get(connection.name) is connection:
            self.registry.down(connection.name, reason)

    def beat(self, connection: Connection, beat: Beat) -> None:
        """A worker's heartbeat."""
        if self._connections.get(connection.name) is connection:
            self.registry.beat(connection.name, beat)

    def hung(self, connection: Connection, reason: str) -> None:
        """A worker does not move."""
        self.unreachable(connection, reason)

    def revived(self, connection: Connection) -> None:
        """A worker that hung moves again."""
        if self._connections.get(connection.name) is connection:
            self.registry.serving(connection.name)

    def _disconnect(self, name: str) -> None:
        connection = self._connections.pop(name, None)
        if connection is not None:
            self._close(connection.close(), name)

    def _let_go(self, name: str) -> None:
        """Disconnects as soon as the worker's open asks have ended."""
        connection = self._connections.pop(name, None)
        if connection is not None:
            self._close(connection.finish(), name)

    def _close(self, closing: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(closing, name=f"closing {name}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _worker_changed(self, worker: Worker) -> None:
        self._dispatcher.fleet_changed()
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
