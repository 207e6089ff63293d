"""A worker answers its own fleet only, and nobody writes the secret down."""

import asyncio
import logging
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import SecretStr

from conclave.orchestrator.client import AsyncClient, Unauthenticated
from conclave.orchestrator.config import GatewayConfig
from conclave.orchestrator.gateway.server import Gateway
from conclave.orchestrator.lines.nearest import nearest
from conclave.orchestrator.routing.registry import WorkerState
from conclave.orchestrator.security.channels import WithMetadata, fleet_metadata
from conclave.orchestrator.security.settings import SecurityConfig, TokenConfig
from conclave.orchestrator.security.tokens import digest, new_token
from conclave.protos import generation_pb2, worker_pb2
from conclave.protos.worker_pb2_grpc import WorkerServiceStub
from conclave.worker.config import (
    FLEET_SECRET,
    EngineConfig,
    WorkerConfig,
    fleet_secret_given,
    is_loopback,
)
from conclave.worker.errors import ConfigError
from conclave.worker.serving.credentials import check_exposure, interceptors
from conclave.worker.serving.server import WorkerServer

SECRET = secrets.token_urlsafe(32)
PATIENCE = 20.0


@pytest.fixture(scope="module")
def guarded(text_checkpoint: Path) -> Iterator[WorkerServer]:
    """A worker of a fleet."""
    engine = EngineConfig(model=text_checkpoint, max_context=200, kv_tokens=4096, threads=1)
    server = WorkerServer(WorkerConfig(name="alice", engine=engine, fleet_secret=SecretStr(SECRET)))
    yield server
    server.stop()


def asks(channel: grpc.Channel) -> dict[str, Any]:
    """One call of every kind."""
    stub = WorkerServiceStub(channel)
    prompt = generation_pb2.Prompt(text="hi")
    sampling = generation_pb2.SamplingParams(max_tokens=1)
    ask = generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling)
    info = reflection_pb2_grpc.ServerReflectionStub(channel)
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    return {
        "describe": lambda: stub.Describe(worker_pb2.DescribeRequest(), timeout=PATIENCE),
        "complete": lambda: stub.Complete(ask, timeout=PATIENCE),
        "generate": lambda: list(stub.Generate(ask, timeout=PATIENCE)),
        "drain": lambda: stub.Drain(worker_pb2.DrainRequest(), timeout=PATIENCE),
        "converse": lambda: list(stub.Converse(iter(()), timeout=PATIENCE)),
        "reflection": lambda: list(info.ServerReflectionInfo(iter([listing]), timeout=PATIENCE)),
    }


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param("", id="nothing"),
        pytest.param("wrong", id="wrong"),
        pytest.param(SECRET[:-1], id="too short"),
        pytest.param(SECRET + "x", id="too long"),
    ],
)
@pytest.mark.parametrize(
    "call", ["describe", "complete", "generate", "drain", "converse", "reflection"]
)
def test_who_shows_no_secret_is_refused(guarded: WorkerServer, call: str, shown: str) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        line: Any = WithMetadata(channel, fleet_metadata(shown))
        with pytest.raises(grpc.RpcError) as caught:
            asks(line)[call]()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "its own fleet" in (caught.value.details() or "") and SECRET not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such sockets")
@pytest.mark.parametrize("shown", ["", "wrong", SECRET], ids=["nothing", "wrong", "the secret"])
def test_the_unix_socket_is_no_back_door(guarded: WorkerServer, shown: str) -> None:
    assert nearest(guarded.address) != guarded.address
    with grpc.insecure_channel(nearest(guarded.address)) as channel:
        line: Any = WithMetadata(channel, fleet_metadata(shown))
        if shown == SECRET:
            assert asks(line)["describe"]().worker == "alice"
            return
        with pytest.raises(grpc.RpcError) as caught:
            asks(line)["complete"]()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_fleet_is_answered(guarded: WorkerServer) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        line: Any = WithMetadata(channel, fleet_metadata(SECRET))
        assert asks(line)["describe"]().worker == "alice"
        assert asks(line)["complete"]().usage.completion_tokens == 1
        assert asks(line)["reflection"]()


def test_health_is_open(guarded: WorkerServer) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def settings(**fields: Any) -> WorkerConfig:
    return WorkerConfig(engine=EngineConfig(model=Path("m")), **fields)


def test_without_a_secret_nothing_stands_before_the_service() -> None:
    assert interceptors(settings()) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "node.example"])
def test_an_open_worker_keeps_to_the_loopback(host: str) -> None:
    with pytest.raises(ConfigError, match=FLEET_SECRET):
        check_exposure(settings(host=host))
    with pytest.raises(ConfigError, match="anybody on the network"):
        WorkerServer(settings(host=host))
    check_exposure(settings(host=host, insecure=True))
    check_exposure(settings(host=host, fleet_secret=SecretStr(SECRET)))


@pytest.mark.parametrize("host", ["auto", "127.0.0.1", "localhost", "::1"])
def test_on_the_loopback_it_may_be_open(host: str) -> None:
    check_exposure(settings(host=host))


def test_what_counts_as_the_loopback() -> None:
    assert is_loopback("127.9.9.9") and is_loopback("[::1]")
    for host in ("", "0", "::", "localhost.example", "127.0.0.1.example", "2130706433"):
        assert not is_loopback(host)


def test_the_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FLEET_SECRET, raising=False)
    assert fleet_secret_given() is None
    monkeypatch.setenv(FLEET_SECRET, f"{SECRET}\n")
    given = fleet_secret_given()
    assert given is not None and given.get_secret_value() == SECRET
    for bad in ("short", "with ünicode characters", "two\nlines of a secret"):
        monkeypatch.setenv(FLEET_SECRET, bad)
        with pytest.raises(ConfigError, match=FLEET_SECRET) as caught:
            fleet_secret_given()
        assert bad not in str(caught.value)


def test_no_secret_is_logged(
    guarded: WorkerServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A gateway with a token before a worker with a secret, both right and wrong, all logging."""
    caplog.set_level(logging.DEBUG)
    token, wrong = new_token(), new_token()
    tokens = (TokenConfig(name="caller", sha256=digest(token)),)
    config = GatewayConfig(port=0, security=SecurityConfig(tokens=tokens))

    async def serve(secret: str) -> WorkerState:
        gateway = Gateway(config)
        await gateway.start()
        gateway.located("alice", guarded.address, guarded.incarnation, 1, secret)
        worker = gateway.registry.workers["alice"]
        async with asyncio.timeout(PATIENCE):
            while worker.state is WorkerState.STARTING:
                await asyncio.sleep(0.01)
        logging.getLogger("test").debug("%r %r", worker, vars(gateway))
        async with AsyncClient(gateway.address, token=token, timeout=PATIENCE) as client:
            logging.getLogger("test").debug("%r %r", client, await client.workers())
            if worker.state is WorkerState.SERVING:
                await client.generate("hi", max_tokens=2)
                assert [d async for d in client.stream("hi", max_tokens=2)]
        async with AsyncClient(gateway.address, token=wrong) as client:
            with pytest.raises(Unauthenticated) as caught:
                await client.generate("hi")
            logging.getLogger("test").exception("refused", exc_info=caught.value)
        await gateway.stop(0.0)
        return worker.state

    assert asyncio.run(serve(SECRET), debug=True) is WorkerState.SERVING
    assert asyncio.run(serve(wrong), debug=True) is WorkerState.DOWN
    logging.getLogger("test").debug("%r %s", guarded.config, guarded.config.model_dump_json())
    output = capfd.readouterr()
    written = caplog.text + output.out + output.err
    assert "alice" in written and "refused" in written
    for secret in (SECRET, token, wrong):
        assert secret not in written
