"""Who may call a worker: its own fleet, which shows the fleet's secret with every call.

The secret is metadata, sent once a call. A gateway has one long call to each worker, so asks on it
cost nothing more. Health stays open, for probes that know no secret; it tells nothing but "serves".
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from ..config import FLEET_SECRET, FLEET_SECRET_KEY, WorkerConfig, is_loopback
from ..errors import ConfigError, Unauthenticated
from . import wire

HEALTH = "/grpc.health.v1.Health/"
_REFUSED = Unauthenticated(
    "this worker answers only its own fleet: call the fleet's gateway, or show the fleet's secret "
    f"({FLEET_SECRET}) as the metadata `{FLEET_SECRET_KEY}`"
)

Handler = Any
"""A grpc.RpcMethodHandler, which is generic in the stubs only."""


def check_exposure(config: WorkerConfig) -> None:
    """Raises ConfigError if whoever is on the network could use the worker."""
    if config.insecure or config.fleet_secret is not None or is_loopback(config.listen_host):
        return
    raise ConfigError(
        f"a worker on {config.listen_host} would answer anybody on the network: set {FLEET_SECRET} "
        "here and for its callers, listen on 127.0.0.1, or say --insecure"
    )


def interceptors(config: WorkerConfig) -> list[Any]:
    """What stands before the services of a worker; nothing if it has no secret."""
    if config.fleet_secret is None:
        return []
    return [FleetOnly(config.fleet_secret.get_secret_value())]


class FleetOnly(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses every call but health that does not show the secret."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The service's own handler, or one that refuses."""
        details: Any = handler_call_details
        shown = dict(details.invocation_metadata or ()).get(FLEET_SECRET_KEY, "")
        known = hmac.compare_digest(str(shown).encode(), self._secret)
        if known or details.method.startswith(HEALTH):
            return await continuation(handler_call_details)
        return _REFUSAL


async def _refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    code, message, trailing = wire.status(_REFUSED)
    await context.abort(code, message, trailing)


# A handler of streams refuses at once; one of single messages would first wait for the message.
_REFUSAL: Handler = grpc.stream_stream_rpc_method_handler(_refuse)
