"""What a broken call to a worker becomes."""

import grpc
import pytest

from conclave.orchestrator.status import DETAILS_KEY, Failure


@pytest.mark.parametrize(
    ("code", "detailed", "becomes"),
    [
        ("UNAVAILABLE", False, "UNAVAILABLE"),
        ("CANCELLED", False, "UNAVAILABLE"),  # a server that stops
        ("INTERNAL", False, "UNAVAILABLE"),  # gRPC's own word of a connection that broke
        ("INTERNAL", True, "INTERNAL"),  # a worker's
        ("DEADLINE_EXCEEDED", False, "DEADLINE_EXCEEDED"),
    ],
)
def test_failure_of_a_call(code: str, detailed: bool, becomes: str) -> None:
    trailing = grpc.aio.Metadata(*([(DETAILS_KEY, b"")] if detailed else []))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode[code], grpc.aio.Metadata(), trailing, "Internal error from Core", ""
    )
    assert Failure.of_call(error).code is grpc.StatusCode[becomes]
