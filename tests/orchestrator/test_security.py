"""Tokens, limits and what may listen where; TLS is in test_tls.py."""

import asyncio
import hashlib
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError
from typer.testing import CliRunner

from conclave.orchestrator.cli import app
from conclave.orchestrator.client import (
    AsyncClient,
    Client,
    ConclaveError,
    InvalidRequest,
    Overloaded,
    RemoteError,
    Unauthenticated,
)
from conclave.orchestrator.config import FleetConfig, FleetConfigError, GatewayConfig
from conclave.orchestrator.fleet.plan import Observation, Phase
from conclave.orchestrator.gateway.server import Gateway
from conclave.orchestrator.security.interceptor import interceptors, presented
from conclave.orchestrator.security.limits import Gate
from conclave.orchestrator.security.settings import (
    Pace,
    SecurityConfig,
    TlsConfig,
    TokenConfig,
    check_exposure,
)
from conclave.orchestrator.security.tokens import LOOK_SECONDS, Callers, digest, new_token
from conclave.worker.actor import Endpoint
from conclave.worker.config import WorkerConfig
from conclave.worker.errors import ConfigError

Run = Callable[[Any], None]
TOKEN = new_token()
TLS = TlsConfig(certificate=Path("c"), private_key=Path("k"))
MUTUAL = TlsConfig(certificate=Path("c"), private_key=Path("k"), client_ca=Path("a"))


def known(**limits: Any) -> SecurityConfig:
    return SecurityConfig(tokens=(TokenConfig(name="alice", sha256=digest(TOKEN), **limits),))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# -- who may call ----------------------------------------------------------------------------------


def test_the_default_costs_nothing() -> None:
    assert interceptors(SecurityConfig()) == []


def test_only_the_right_token_opens(rig: Any, run: Run) -> None:
    async def scenario() -> None:
        async with rig(1, security=known()) as fleet:
            for token in (None, "wrong", TOKEN[:-1], TOKEN + "x"):
                async with AsyncClient(fleet.gateway.address, token=token) as client:
                    calls = (client.generate("hi"), client.workers(), client.fleet())
                    for call in calls:
                        with pytest.raises(Unauthenticated) as caught:
                            await call
                        assert "token" in str(caught.value)
                        assert (token or TOKEN) not in str(caught.value)
                    with pytest.raises(Unauthenticated):
                        await anext(aiter(client.stream("hi")))
            assert not fleet.workers[0].asked
            async with AsyncClient(fleet.gateway.address, token=TOKEN) as client:
                assert (await client.generate("hi")).outputs[0].text == "t0 t1 t2 "
                assert [delta.text async for delta in client.stream("hi")]
                assert len(await client.workers()) == 1

    run(scenario())


def test_health_is_open_and_reflection_is_not(rig: Any, run: Run) -> None:
    async def scenario() -> None:
        async with rig(1, security=known()) as fleet:
            health: Any = health_pb2_grpc.HealthStub(fleet.channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(fleet.channel)
            asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.ServerReflectionInfo(iter(asked)):
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            shown = (("authorization", f"Bearer {TOKEN}"),)
            answers = stub.ServerReflectionInfo(iter(asked), metadata=shown)
            assert (await anext(aiter(answers))).list_services_response.service

    run(scenario())


def test_a_refusal_does_not_wait_for_a_message(rig: Any, run: Run) -> None:
    async def scenario() -> None:
        async with rig(1, security=known()) as fleet:
            method = "/conclave.v1.GatewayService/Generate"
            call = fleet.channel.stream_stream(method)()
            async with asyncio.timeout(5.0):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    run(scenario())


@pytest.mark.parametrize(
    ("metadata", "token"),
    [
        ((("authorization", "Bearer abc"),), "abc"),
        ((("x", "y"), ("authorization", "bearer  abc ")), "abc"),
        ((("authorization", "Basic abc"),), ""),
        ((("authorization", "Bearer "),), ""),
        ((), ""),
        (None, ""),
    ],
)
def test_reading_the_token(metadata: Any, token: str) -> None:
    assert presented(metadata) == token


def test_a_blocking_client_with_a_token(rig: Any, run: Run) -> None:
    def ask(address: str) -> None:
        with Client(address, token=TOKEN) as client:
            assert client.generate("hi").worker == "w0"
            assert "".join(delta.text for delta in client.stream("hi")) == "t0 t1 t2 "
        with Client(address) as client, pytest.raises(Unauthenticated, match="CONCLAVE_TOKEN"):
            client.generate("hi")

    async def scenario() -> None:
        async with rig(1, security=known()) as fleet:
            await asyncio.to_thread(ask, fleet.gateway.address)

    run(scenario())


@pytest.mark.parametrize("token", ["", "with space", "line\n", "ü"])
def test_a_client_refuses_what_is_no_token(token: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        Client(token=token)
    assert not token or token not in str(caught.value)


# -- how much they may do --------------------------------------------------------------------------


def test_a_gate_keeps_a_pace() -> None:
    clock = Clock()
    gate = Gate(Pace(requests_per_second=2.0, burst=3), "it", clock)
    for _ in range(3):
        gate.enter()
    with pytest.raises(Overloaded) as caught:
        gate.enter()
    assert caught.value.retry_after == pytest.approx(0.5)
    clock.now += 0.5
    gate.enter()
    with pytest.raises(Overloaded):
        gate.enter()
    assert gate.open == 4
    clock.now += 1000.0
    for _ in range(3):
        gate.enter()
    with pytest.raises(Overloaded):
        gate.enter()


def test_a_gate_counts_who_is_inside() -> None:
    gate = Gate(Pace(max_concurrent=2), "it")
    gate.enter()
    gate.enter()
    with pytest.raises(Overloaded, match="it has 2 open requests"):
        gate.enter()
    gate.leave()
    gate.enter()
    assert gate.open == 2


def test_the_rate_of_a_token(rig: Any, run: Run) -> None:
    async def scenario() -> None:
        async with (
            rig(1, security=known(requests_per_second=0.1, burst=2)) as fleet,
            AsyncClient(fleet.gateway.address, token=TOKEN) as client,
        ):
            for _ in range(2):
                await client.generate("hi")
            with pytest.raises(Overloaded, match="`alice` may send") as caught:
                await client.generate("hi")
            assert 8.0 < caught.value.retry_after <= 10.0

    run(scenario())


@pytest.mark.parametrize("whose", ["token", "total"])
def test_requests_at_a_time(rig: Any, run: Run, scripts: Any, whose: str) -> None:
    pace = Pace(max_concurrent=1)
    one = known(max_concurrent=1) if whose == "token" else SecurityConfig(total=pace)

    async def scenario() -> None:
        async with (
            rig(1, security=one) as fleet,
            AsyncClient(fleet.gateway.address, token=TOKEN) as client,
        ):
            fleet.workers[0].script = scripts.hang()
            first = asyncio.create_task(client.generate("hi"))
            await fleet.until(lambda: fleet.workers[0].running == 1)
            with pytest.raises(Overloaded, match="1 open requests"):
                await client.generate("hi")
            first.cancel()
            await fleet.until(lambda: fleet.workers[0].running == 0)
            fleet.workers[0].script = scripts.answer()
            for _ in range(3):
                assert await client.generate("hi")

    run(scenario())


def test_every_end_gives_its_place_back(
    rig: Any, run: Run, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = watched_gates(monkeypatch)

    async def scenario() -> None:
        async with (
            rig(1, security=known(max_concurrent=100)) as fleet,
            AsyncClient(fleet.gateway.address, token=TOKEN) as client,
        ):
            worker = fleet.workers[0]
            worker.script = scripts.hang()
            for whole in (True, False):
                calls = [asyncio.create_task(ask(client, whole)) for _ in range(100)]
                await fleet.until(lambda: worker.running == 100)
                assert sorted(gate.open for gate in gates) == [100, 100]
                for call in calls:
                    call.cancel()
                await asyncio.wait(calls)
                await fleet.until(lambda: not worker.running and not any(g.open for g in gates))
            for whole in (True, False):
                with pytest.raises(ConclaveError):
                    await ask(client, whole, timeout=0.1)
            worker.script = scripts.invalid("sampling.top_p")
            with pytest.raises(InvalidRequest):
                await client.generate("hi")
            with pytest.raises(Unauthenticated):
                async with AsyncClient(fleet.gateway.address) as stranger:
                    await stranger.generate("hi")
            await fleet.until(lambda: not any(gate.open for gate in gates))

    run(scenario())


async def ask(client: AsyncClient, whole: bool, timeout: float = 20.0) -> None:
    if whole:
        await client.generate("hi", timeout=timeout)
        return
    async for _ in client.stream("hi", timeout=timeout):
        pass


def watched_gates(monkeypatch: pytest.MonkeyPatch) -> list[Gate]:
    """Every gate made from now on."""
    gates: list[Gate] = []
    made = Gate.__init__

    def remember(self: Gate, *arguments: Any) -> None:
        made(self, *arguments)
        gates.append(self)

    monkeypatch.setattr(Gate, "__init__", remember)
    return gates


def test_an_early_cancel_holds_no_place(
    rig: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that send headers, never their message, and go away."""
    gates = watched_gates(monkeypatch)

    async def scenario() -> None:
        async with rig(1, security=known(max_concurrent=5)) as fleet:
            shown = (("authorization", f"Bearer {TOKEN}"),)
            for _ in range(20):
                call = fleet.channel.stream_stream("/conclave.v1.GatewayService/Complete")(
                    metadata=shown
                )
                await asyncio.sleep(0.01)
                call.cancel()
            async with AsyncClient(fleet.gateway.address, token=TOKEN) as client:
                assert await client.generate("hi")
            assert not any(gate.open for gate in gates)

    run(scenario())


def test_the_size_of_a_message(rig: Any, run: Run) -> None:
    async def scenario() -> None:
        async with (
            rig(1, security=known(max_message_bytes=1000), max_message_mib=1) as fleet,
            AsyncClient(fleet.gateway.address, token=TOKEN) as client,
        ):
            assert await client.generate("x" * 900)
            with pytest.raises(RemoteError, match="this token allows 1000") as caught:
                await client.generate("x" * 1000)
            assert caught.value.code == "RESOURCE_EXHAUSTED"
            with pytest.raises(RemoteError, match="RESOURCE_EXHAUSTED"):
                await client.generate("x" * 2**20)
            assert await client.generate("x")

    run(scenario())


def test_the_tokens_of_an_answer(rig: Any, run: Run) -> None:
    async def scenario() -> None:
        async with (
            rig(1, security=known(max_tokens_per_request=100)) as fleet,
            AsyncClient(fleet.gateway.address, token=TOKEN) as client,
        ):
            assert await client.generate("hi", max_tokens=100)
            assert await client.generate("hi", max_tokens=50, n=2)
            for options in ({"max_tokens": 101}, {"max_tokens": 51, "n": 2}, {}):
                with pytest.raises(InvalidRequest, match="this token") as caught:
                    await client.generate("hi", **options)  # type: ignore[arg-type]
                assert caught.value.violations[0].field == "request.sampling.max_tokens"
            assert await client.score("hi", ["you"])

    run(scenario())


# -- the tokens file -------------------------------------------------------------------------------


_times = itertools.count(1)


def write(path: Path, text: str) -> None:
    """Writes a file that is newer than before, however coarse the file system's clock."""
    path.write_text(text)
    os.utime(path, ns=(0, next(_times)))


def listed(*tokens: str) -> str:
    return "".join(f"- {{name: n{i}, sha256: {digest(t)}}}\n" for i, t in enumerate(tokens))


def names(callers: Callers, *tokens: str) -> list[str | None]:
    found = [callers.find(token) for token in tokens]
    return [caller.config.name if caller is not None else None for caller in found]


def test_the_tokens_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, path = Clock(), tmp_path / "tokens.yaml"
    write(path, listed("one"))
    callers = Callers(SecurityConfig(tokens_file=path), clock)
    assert names(callers, "one", "two") == ["n0", None]
    kept = callers.find("one")
    write(path, listed("one", "two"))
    assert names(callers, "two") == [None], "it is looked at once a second"
    clock.now += LOOK_SECONDS
    assert names(callers, "one", "two") == ["n0", "n1"]
    assert callers.find("one") is kept, "what it has open would be forgotten"
    for broken in ("- {name: x, sha256: one}", "[", "- {name: x}", "7", listed("one", "one")):
        write(path, broken)
        clock.now += LOOK_SECONDS
        assert names(callers, "one", "two") == ["n0", "n1"]
    path.unlink()
    clock.now += LOOK_SECONDS
    assert names(callers, "one") == ["n0"]
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 6 and all("stay as they were" in r.getMessage() for r in warnings)
    assert "one" not in caplog.text.replace("None", "")
    write(path, "")
    clock.now += LOOK_SECONDS
    assert names(callers, "one", "two") == [None, None], "an empty file lets nobody in"


def test_a_bad_tokens_file_is_told_at_the_start(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "tokens.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        interceptors(SecurityConfig(tokens_file=path))
    path.write_text("- {name: a, sha256: conclave_oops}")
    with pytest.raises(ConfigError, match="64 hexadecimal digits") as caught:
        interceptors(SecurityConfig(tokens_file=path))
    assert "oops" not in str(caught.value)


# -- the fleet file --------------------------------------------------------------------------------


def fleet_with(security: object, folder: Path | None = None) -> FleetConfig:
    workers = [{"name": "a", "engine": {"model": "m"}}]
    data = {"workers": workers, "gateway": {"security": security}}
    return FleetConfig.parse(data, source="fleet.yaml", folder=folder)


def test_paths_start_beside_the_fleet_file(tmp_path: Path) -> None:
    tls = {"certificate": "server.pem", "private_key": "/keys/server", "client_ca": "ca.pem"}
    security = fleet_with({"tls": tls, "tokens_file": "tokens.yaml"}, tmp_path).gateway.security
    assert security.tls == TlsConfig(
        certificate=tmp_path / "server.pem",
        private_key=Path("/keys/server"),
        client_ca=tmp_path / "ca.pem",
    )
    assert security.tokens_file == tmp_path / "tokens.yaml"


@pytest.mark.parametrize(
    ("security", "message"),
    [
        ({"tokens": [{"name": "a", "sha256": "conclave_oops"}]}, "tokens[0].sha256: must be 64"),
        ({"tokens": [{"name": "a", "sha": "conclave_oops"}]}, "did you mean `sha256`?"),
        ({"tokens": ["conclave_oops"]}, "tokens[0]"),
        ({"tokens": "conclave_oops"}, "tokens"),
        ({"tokens": [{"name": "a", "sha256": "0" * 64}], "tokens_file": "x"}, "not both"),
        ({"tokens": [{"name": n, "sha256": "0" * 64} for n in "ab"]}, "differ in `sha256`"),
        ({"tokens": [{"name": "a", "sha256": c * 64} for c in "01"]}, "differ in `name`"),
        ({"total": {"burst": 3}}, "`burst` needs `requests_per_second`"),
        ({"tls": {"certificate": "x"}}, "private_key: is missing"),
    ],
)
def test_a_bad_section_is_told_without_its_secrets(security: object, message: str) -> None:
    with pytest.raises(FleetConfigError) as caught:
        fleet_with(security)
    assert message in str(caught.value)
    assert "oops" not in str(caught.value)


# -- what may listen where -------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.7", "gateway.example", ""])
@pytest.mark.parametrize(
    ("security", "message"),
    [
        (SecurityConfig(), "would answer anybody on the network"),
        (known(), "in the clear"),
        (SecurityConfig(tls=TLS), "would answer anybody on the network"),
        (SecurityConfig(tls=MUTUAL), None),
        (known().model_copy(update={"tls": TLS}), None),
        (SecurityConfig(insecure=True), None),
    ],
)
def test_what_may_face_the_network(
    host: str, security: SecurityConfig, message: str | None
) -> None:
    if message is None:
        check_exposure(host, security)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        check_exposure(host, security)
    assert "--insecure" in str(caught.value) and "security." in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "::1", "[::1]"])
def test_the_loopback_needs_nothing(host: str) -> None:
    check_exposure(host, SecurityConfig())


def test_a_gateway_refuses_to_stand_open(run: Run) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match="anybody on the network"):
            await Gateway(GatewayConfig(host="0.0.0.0", port=0)).start()
        open_ = GatewayConfig(host="0.0.0.0", port=0, security=SecurityConfig(insecure=True))
        gateway = Gateway(open_)
        await gateway.start()
        await gateway.stop(0.0)

    run(scenario())


def test_serve_refuses_to_stand_open_before_it_reaches_ray() -> None:
    fleet = str(Path(__file__).resolve().parents[2] / "fleet.yaml")
    words = ["serve", "--fleet", fleet, "--host", "0.0.0.0", "--address", "127.0.0.1:1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "say --insecure" in result.stderr
    result = CliRunner().invoke(app, [*words, "--insecure"])
    assert result.exit_code == 2 and "no Ray cluster answers" in result.stderr


# -- the command line ------------------------------------------------------------------------------


def test_a_token_is_made(rig: Any) -> None:
    result = CliRunner().invoke(app, ["token", "alice: x"])
    token, line = result.stdout.splitlines()
    security = fleet_with({"tokens": yaml.safe_load(line)}).gateway.security
    assert security.tokens[0].name == "alice: x"
    assert security.tokens[0].sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert len(token) > 40 and CliRunner().invoke(app, ["token", "a"]).stdout[:50] != token[:50]


def test_the_command_line_shows_a_token(rig: Any, run: Run) -> None:
    def ask(address: str) -> None:
        for words in (["generate", "hi"], ["generate", "hi", "--stream"], ["workers"]):
            words = [*words, "--address", address]
            answer = CliRunner().invoke(app, words, env={"CONCLAVE_TOKEN": TOKEN})
            assert answer.exit_code == 0, answer.stderr
            assert CliRunner().invoke(app, [*words, "--token", TOKEN]).exit_code == 0
            refused = CliRunner().invoke(app, [*words, "--token", "conclave_oops"])
            assert refused.exit_code == 1 and "does not know the token" in refused.stderr
            assert "oops" not in refused.stderr + refused.stdout
        words = ["score", "a", "b", "--address", address]
        assert CliRunner().invoke(app, words, env={"CONCLAVE_TOKEN": TOKEN}).exit_code == 0

    async def scenario() -> None:
        async with rig(1, security=known()) as fleet:
            await asyncio.to_thread(ask, fleet.gateway.address)

    run(scenario())


# -- what is kept quiet ----------------------------------------------------------------------------


def test_secrets_are_in_no_repr() -> None:
    secret = "fleet-secret-of-this-test"
    endpoint = Endpoint("host:1", "i", 1, "host", secret=secret)
    seen = Observation(Phase.READY, "host:1", secret=secret)
    client = Client(token=TOKEN)
    shown = f"{endpoint!r} {seen!r} {client!r} {vars(client)!r} {vars(client._stub)!r}"
    assert secret not in shown and TOKEN not in shown
    client.close()


def test_a_bad_worker_setting_keeps_the_secret_quiet() -> None:
    with pytest.raises(ValidationError) as caught:
        WorkerConfig.model_validate({"fleet_secret": ["conclave_oops"], "engine": {"model": "m"}})
    assert "oops" not in str(caught.value)
