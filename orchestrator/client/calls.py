"""The two clients: the same calls, once blocking and once for asyncio.

What they share stands elsewhere and only once: requests.py makes the messages, answers.py reads
them, status.py turns statuses into errors. Here is only the part that differs, the waiting.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from ...protos import gateway_pb2, gateway_pb2_grpc
from ...worker.errors import ConclaveError, Unavailable
from ..lines.connection import channel_options
from ..security.channels import (
    PathLike,
    Tls,
    WithMetadata,
    open_async_channel,
    open_channel,
    token_metadata,
)
from ..status import details_of, error_of_status
from .answers import (
    Collector,
    Completion,
    Delta,
    FleetStatus,
    Score,
    WorkerStatus,
    completion_of,
    fleet_of,
    scores_of,
    workers_of,
)
from .requests import Options, Prompt, Select, envelope, score_request, selector_message

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 120.0


class _Caller:
    """What both clients know: the address, the stub and the default timeout."""

    def __init__(self, address: str, channel: WithMetadata, timeout: float | None) -> None:
        self.address = address
        """host:port of the gateway."""
        self._stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)
        self._timeout = timeout

    def _seconds(self, options: Options) -> float | None:
        return options.get("timeout", self._timeout)

    def _error(self, error: Any) -> ConclaveError:
        """For the sync and the async kind of RpcError, which share these methods but no type."""
        code, details = error.code(), details_of(error.trailing_metadata())
        message = error.details() or code.name
        if code is grpc.StatusCode.UNAVAILABLE and details is None:
            message = f"lost the gateway at {self.address}, or none is there: {message}"
        return error_of_status(code, message, details)


class Client(_Caller):
    """Blocking client of a gateway; use it as a context manager or close it. Thread-safe.

    Args:
        address: host:port of the gateway.
        timeout: seconds after which a call is given up, unless it says otherwise; None for never.
        max_message_mib: largest message in either direction.
        token: what the gateway knows this caller by.
        ca: PEM file of the authorities that may have signed the gateway's certificate, or `public`
            for those that come with gRPC. With it, or with a certificate, the connection is TLS.
        certificate, private_key: PEM files, for a gateway that asks its callers for a certificate.

    Every call raises the errors drawn in `conclave.orchestrator.client`.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_message_mib: int = 64,
        token: str | None = None,
        ca: PathLike = None,
        certificate: PathLike = None,
        private_key: PathLike = None,
    ) -> None:
        tls = Tls(ca, certificate, private_key)
        self._channel = open_channel(address, channel_options(max_message_mib), tls)
        super().__init__(address, WithMetadata(self._channel, token_metadata(token)), timeout)

    def generate(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> Completion:
        """A whole answer."""
        request = gateway_pb2.CompleteRequest(**envelope(prompt, options))
        return completion_of(self._call(self._stub.Complete, request, self._seconds(options)))

    def stream(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> "Stream":
        """An answer piece by piece; breaking out of the loop cancels the rest."""
        request = gateway_pb2.GatewayGenerateRequest(**envelope(prompt, options))
        return Stream(self._stub.Generate(request, timeout=self._seconds(options)), self._error)

    def score(
        self,
        context: Prompt | None,
        continuations: Sequence[str | Sequence[int]],
        *,
        logprobs: int | None = None,
        select: Select | None = None,
        timeout: float | None = None,
        request_id: str = "",
    ) -> tuple[Score, ...]:
        """How likely each continuation is after the context; texts or token ids."""
        request = gateway_pb2.GatewayScoreRequest(
            request=score_request(context, continuations, request_id, logprobs),
            selector=selector_message(select),
        )
        return scores_of(self._call(self._stub.Score, request, timeout or self._timeout))

    def workers(self, select: Select | None = None) -> tuple[WorkerStatus, ...]:
        """Every worker that the gateway knows."""
        request = gateway_pb2.ListWorkersRequest(selector=selector_message(select))
        return workers_of(self._call(self._stub.ListWorkers, request, self._timeout))

    def fleet(self) -> FleetStatus:
        """The fleet as a whole."""
        request = gateway_pb2.GetFleetRequest()
        return fleet_of(self._call(self._stub.GetFleet, request, self._timeout))

    def close(self) -> None:
        """Ends every call and the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: Any, request: object, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self._error(error) from None


class AsyncClient(_Caller):
    """The same for asyncio; use it as an async context manager or close it."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_message_mib: int = 64,
        token: str | None = None,
        ca: PathLike = None,
        certificate: PathLike = None,
        private_key: PathLike = None,
    ) -> None:
        tls = Tls(ca, certificate, private_key)
        self._channel = open_async_channel(address, channel_options(max_message_mib), tls)
        super().__init__(address, WithMetadata(self._channel, token_metadata(token)), timeout)

    async def generate(
        self, prompt: Prompt | None = None, **options: Unpack[Options]
    ) -> Completion:
        """A whole answer."""
        request = gateway_pb2.CompleteRequest(**envelope(prompt, options))
        return completion_of(await self._call(self._stub.Complete, request, self._seconds(options)))

    def stream(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> "AsyncStream":
        """An answer piece by piece; dropping the stream cancels the rest."""
        request = gateway_pb2.GatewayGenerateRequest(**envelope(prompt, options))
        return AsyncStream(
            self._stub.Generate(request, timeout=self._seconds(options)), self._error
        )

    async def score(
        self,
        context: Prompt | None,
        continuations: Sequence[str | Sequence[int]],
        *,
        logprobs: int | None = None,
        select: Select | None = None,
        timeout: float | None = None,
        request_id: str = "",
    ) -> tuple[Score, ...]:
        """How likely each continuation is after the context; texts or token ids."""
        request = gateway_pb2.GatewayScoreRequest(
            request=score_request(context, continuations, request_id, logprobs),
            selector=selector_message(select),
        )
        return scores_of(await self._call(self._stub.Score, request, timeout or self._timeout))

    async def workers(self, select: Select | None = None) -> tuple[WorkerStatus, ...]:
        """Every worker that the gateway knows."""
        request = gateway_pb2.ListWorkersRequest(selector=selector_message(select))
        return workers_of(await self._call(self._stub.ListWorkers, request, self._timeout))

    async def fleet(self) -> FleetStatus:
        """The fleet as a whole."""
        request = gateway_pb2.GetFleetRequest()
        return fleet_of(await self._call(self._stub.GetFleet, request, self._timeout))

    async def close(self) -> None:
        """Ends every call and the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: object, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self._error(error) from None


class _Gathered:
    """What both kinds of stream know: the call and what has come of it."""

    def __init__(self, call: Any, error: Callable[[Any], ConclaveError]) -> None:
        self._call = call
        self._error = error
        self._collector = Collector()

    @property
    def completion(self) -> Completion:
        """The whole answer; only after the stream has ended well."""
        if self._collector.completion is None:
            raise RuntimeError("read the stream to its end first")
        return self._collector.completion

    def close(self) -> None:
        """Cancels what has not come yet."""
        self._call.cancel()

    def __del__(self) -> None:
        self._call.cancel()

    def _check_ended(self) -> None:
        if self._collector.completion is None:
            raise Unavailable("the stream ended without an end; try again")


class Stream(_Gathered):
    """The pieces of one answer; `completion` is the whole, at the end."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        try:
            for event in self._call:
                delta = self._collector.take(event)
                if delta is not None:
                    return delta
        except grpc.RpcError as error:
            raise self._error(error) from None
        self._check_ended()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


class AsyncStream(_Gathered):
    """The pieces of one answer, for asyncio; `completion` is the whole, at the end."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        try:
            while (event := await self._call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                delta = self._collector.take(event)
                if delta is not None:
                    return delta
        except grpc.RpcError as error:
            raise self._error(error) from None
        self._check_ended()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *unused: object) -> None:
        self.close()
