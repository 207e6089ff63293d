"""What stands before the gateway's services: who calls, and whether that is too much.

A caller is told by the headers, before its message is read. Its request is counted when the service
begins and until it ends, in whatever way; in between nothing waits, so no cancel can leave a count
behind. A gateway without tokens and limits has no interceptor at all.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from ...worker.errors import ConclaveError, InvalidRequest, Unauthenticated
from ..status import Context, Failure, abort
from .limits import Gate
from .settings import Pace, SecurityConfig
from .tokens import Caller, Callers

HEALTH = "/grpc.health.v1.Health/"
SCHEME = "bearer "
MISSING = Unauthenticated(
    "this gateway wants a token: send the metadata `authorization: Bearer TOKEN` (the clients' "
    "`token`, or CONCLAVE_TOKEN for the command line); who runs the gateway gives tokens out"
)
UNKNOWN = Unauthenticated(
    "this gateway does not know the token that was sent; it may have been withdrawn, ask who runs "
    "the gateway for a new one"
)

Handler = Any
"""A grpc.RpcMethodHandler, which is generic in the stubs only."""


def interceptors(security: SecurityConfig) -> list[Any]:
    """What the settings ask for; nothing by default. Raises ConfigError for a bad tokens file."""
    if not security.wants_tokens and security.total == Pace():
        return []
    return [Guard(security)]


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Knows the callers and counts their requests.

    Health checks pass: load balancers send them, hold no token, and learn only whether it serves.
    """

    def __init__(self, security: SecurityConfig) -> None:
        self._callers = Callers(security) if security.wants_tokens else None
        self._total = Gate(security.total, "the gateway")
        self._handlers: dict[str, tuple[Handler, Handler]] = {}
        """As those of a caller, for callers without a token."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The service's own handler, counted, or one that refuses."""
        details: Any = handler_call_details
        if details.method.startswith(HEALTH):
            return await continuation(handler_call_details)
        caller = None
        if self._callers is not None:
            token = presented(details.invocation_metadata)
            caller = self._callers.find(token) if token else None
            if caller is None:
                return _refusal(UNKNOWN if token else MISSING)
        handler = await continuation(handler_call_details)
        return handler and self._counted(details.method, handler, caller)

    def _counted(self, method: str, handler: Handler, caller: Caller | None) -> Handler:
        """The handler that counts for this caller; made once, not for every call."""
        known = caller.handlers if caller is not None else self._handlers
        kept = known.get(method)
        if kept is None or kept[0] is not handler:
            counted = _counted(handler, _Admission(caller, self._total))
            kept = known[method] = (handler, counted)
        return kept[1]


def presented(metadata: Any) -> str:
    """The bearer token among a call's metadata; empty if there is none."""
    for key, value in metadata or ():
        if key == "authorization" and str(value)[: len(SCHEME)].lower() == SCHEME:
            return str(value)[len(SCHEME) :].strip()
    return ""


class _Oversize:
    """Stands for a request that was too large to be read."""

    def __init__(self, size: int) -> None:
        self.size = size


class _Admission:
    """The way in and out of a caller's requests."""

    def __init__(self, caller: Caller | None, total: Gate) -> None:
        self._caller = caller
        self._gates = [caller.gate, total] if caller is not None else [total]
        self.largest = caller.config.max_message_bytes if caller is not None else None

    @contextmanager
    def __call__(self, request: Any) -> Iterator[None]:
        """Counts a request while it is open. Raises what the caller is to be told."""
        entered: list[Gate] = []
        try:
            for gate in self._gates:
                gate.enter()
                entered.append(gate)
            self._check(request)
            yield
        finally:
            for gate in entered:
                gate.leave()

    def _check(self, request: Any) -> None:
        if isinstance(request, _Oversize):
            raise Failure(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the request has {request.size} bytes; this token allows {self.largest}",
            )
        most = self._caller.config.max_tokens_per_request if self._caller is not None else None
        if most is not None:
            check_tokens(request, most)


def check_tokens(request: Any, most: int) -> None:
    """Raises InvalidRequest if a request to generate may make more answer tokens."""
    sampling = getattr(getattr(request, "request", None), "sampling", None)
    if sampling is None:
        return
    if not sampling.HasField("max_tokens"):
        wrong = f"is missing; this token needs it, and allows {most} answer tokens a request"
        raise InvalidRequest.of("request.sampling.max_tokens", wrong)
    wanted = sampling.max_tokens * max(sampling.n, 1)
    if wanted > most:
        wrong = f"allows {wanted} answer tokens in all; this token allows {most} a request"
        raise InvalidRequest.of("request.sampling.max_tokens", wrong)


def _counted(handler: Handler, admission: _Admission) -> Handler:
    """The same handler behind an admission."""
    kind = _kind(handler)
    behaviour = getattr(handler, kind)

    async def whole(request: Any, context: Context) -> Any:
        try:
            with admission(request):
                return await behaviour(request, context)
        except (Failure, ConclaveError) as error:
            await abort(context, error)

    async def pieces(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            with admission(request):
                async for piece in behaviour(request, context):
                    yield piece
        except (Failure, ConclaveError) as error:
            await abort(context, error)

    changes: dict[str, Any] = {kind: pieces if inspect.isasyncgenfunction(behaviour) else whole}
    if admission.largest is not None and not handler.request_streaming:
        changes["request_deserializer"] = _at_most(admission.largest, handler.request_deserializer)
    return handler._replace(**changes)


def _at_most(largest: int, read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Reads messages up to a size."""
    return lambda data: read(data) if len(data) <= largest else _Oversize(len(data))


def _kind(handler: Handler) -> str:
    """The name of the one behaviour that a handler has."""
    takes = "stream" if handler.request_streaming else "unary"
    gives = "stream" if handler.response_streaming else "unary"
    return f"{takes}_{gives}"


def _refusal(error: Unauthenticated) -> Handler:
    async def refuse(requests: Any, context: Context) -> None:
        await abort(context, error)

    # A handler of streams refuses at once; one of messages would first wait for a message.
    return grpc.stream_stream_rpc_method_handler(refuse)
