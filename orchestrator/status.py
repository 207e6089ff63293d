"""Errors as gRPC statuses, and back: one table for the gateway's answers and the client's errors.

A status made here always carries `google.rpc` details (BadRequest, RetryInfo or ErrorInfo), so a
receiver can tell it from one that gRPC itself made of a broken connection, which never does.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from ..protos import generation_pb2
from ..worker.errors import (
    Cancelled,
    ConclaveError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unauthenticated,
    Unavailable,
    Violation,
)
from .ensemble.calls import QuorumNotMet
from .routing.router import WorkerNotFound

DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "conclave.v1"
RETRY_SECONDS = 1.0
"""When to try again, if whoever refused did not say."""

Context = grpc.aio.ServicerContext[object, object]
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class RemoteError(ConclaveError):
    """An error that has no class of its own, such as INTERNAL; `code` is its name in gRPC."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Failure(Exception):
    """A non-OK status on its way through the gateway, kept as it came."""

    def __init__(self, code: grpc.StatusCode, message: str, details: bytes | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details
        """The serialized google.rpc.Status; None if gRPC itself made this status."""

    @classmethod
    def of_call(cls, error: grpc.aio.AioRpcError) -> "Failure":
        """The failure of a call to a worker.

        Nobody cancels a call and then looks at its status, so CANCELLED is a server that stops.
        INTERNAL without our details is gRPC's own, of a connection that broke in the middle of an
        operation: a worker that fails says so with details.
        """
        code, details = error.code(), details_of(error.trailing_metadata())
        lost = code is grpc.StatusCode.INTERNAL and details is None
        if code is grpc.StatusCode.CANCELLED or lost:
            code = grpc.StatusCode.UNAVAILABLE
        return cls(code, error.details() or code.name, details)

    @classmethod
    def of_status(cls, packed: bytes) -> "Failure":
        """The failure of an ask that ended with a serialized google.rpc.Status."""
        status = status_pb2.Status.FromString(packed)
        return cls(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message, packed)

    @property
    def retry_after(self) -> float | None:
        """Seconds after which to try again, if whoever refused said so."""
        return _unpack(self.details)[1]

    @property
    def is_overload(self) -> bool:
        """A full worker; one that does not say when to retry met a message too large for all."""
        full = self.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        return full and self.retry_after is not None

    @property
    def says_more(self) -> bool:
        """Whether it tells a caller what to do, and not only that a worker failed."""
        return self.is_overload or self.code is grpc.StatusCode.INVALID_ARGUMENT

    @classmethod
    def of_event(cls, error: generation_pb2.Error) -> "Failure":
        """The failure that a worker told in its first event instead of a status."""
        after = error.retry_after_seconds if error.HasField("retry_after_seconds") else None
        code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
        detail = _retry_info(after) if after is not None else _error_info(code)
        return cls(code, error.message, _pack(code, error.message, detail))

    @classmethod
    def of_error(cls, error: ConclaveError) -> "Failure":
        """The failure that tells a caller of a typed error."""
        code, detail = _describe(error)
        return cls(code, str(error), _pack(code, str(error), detail))

    def event(self, request_id: str) -> generation_pb2.GenerateResponse:
        """The terminal event for a stream that has begun."""
        retryable = self.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
        error = generation_pb2.Error(
            code=self.code.value[0], message=self.message, retryable=retryable
        )
        return generation_pb2.GenerateResponse(
            request_id=request_id, failed=generation_pb2.Failed(error=error)
        )


async def abort(context: Context, error: Failure | ConclaveError) -> NoReturn:
    """Ends a call of the gateway with a status."""
    failure = error if isinstance(error, Failure) else Failure.of_error(error)
    trailing = ((DETAILS_KEY, failure.details),) if failure.details else ()
    await context.abort(failure.code, failure.message, trailing)


def details_of(metadata: Iterable[Any] | None) -> bytes | None:
    """The packed details in a call's trailing metadata, if there are any."""
    for key, value in metadata or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return value
    return None


def error_of_status(code: grpc.StatusCode, message: str, details: bytes | None) -> ConclaveError:
    """The typed error that a client raises for a status."""
    violations, retry_after = _unpack(details)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(violations or [Violation("request", message)])
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after is not None:
        return Overloaded(message, retry_after)
    plain: dict[grpc.StatusCode, type[ConclaveError]] = {
        grpc.StatusCode.NOT_FOUND: WorkerNotFound,
        grpc.StatusCode.ABORTED: QuorumNotMet,
        grpc.StatusCode.UNAVAILABLE: Unavailable,
        grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
        grpc.StatusCode.CANCELLED: Cancelled,
    }
    return plain[code](message) if code in plain else RemoteError(code.name, message)


def error_of_event(error: generation_pb2.Error) -> ConclaveError:
    """The typed error that a client raises for a `failed` event."""
    failure = Failure.of_event(error)
    return error_of_status(failure.code, failure.message, failure.details)


def _describe(error: ConclaveError) -> tuple[grpc.StatusCode, Message]:
    if isinstance(error, InvalidRequest):
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations
        ]
        detail = error_details_pb2.BadRequest(field_violations=fields)
        return grpc.StatusCode.INVALID_ARGUMENT, detail
    if isinstance(error, Overloaded):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, _retry_info(error.retry_after)
    if isinstance(error, Unavailable):
        return grpc.StatusCode.UNAVAILABLE, _retry_info(RETRY_SECONDS)
    code = grpc.StatusCode.INTERNAL
    if isinstance(error, WorkerNotFound):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, QuorumNotMet):
        code = grpc.StatusCode.ABORTED
    elif isinstance(error, Unauthenticated):
        code = grpc.StatusCode.UNAUTHENTICATED
    elif isinstance(error, DeadlineExceeded):
        code = grpc.StatusCode.DEADLINE_EXCEEDED
    return code, _error_info(code)


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _error_info(code: grpc.StatusCode) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=code.name, domain=ERROR_DOMAIN)


def _pack(code: grpc.StatusCode, message: str, detail: Message) -> bytes:
    packed = AnyMessage()
    packed.Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=message, details=[packed])
    return bytes(status.SerializeToString())


def _unpack(details: bytes | None) -> tuple[list[Violation], float | None]:
    """Field violations and the pause before a retry in seconds."""
    violations: list[Violation] = []
    retry_after = None
    try:
        status = status_pb2.Status.FromString(details or b"")
    except DecodeError:
        return violations, retry_after
    for packed in status.details:
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Unpack(bad):
            violations += [Violation(v.field, v.description) for v in bad.field_violations]
        elif packed.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return violations, retry_after
