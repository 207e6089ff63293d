"""TLS at the gateway: who trusts whom, and certificates that change while it runs.

The authorities and keys are made here, for this run only.
"""

import asyncio
import datetime
import ipaddress
import itertools
import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from conclave.orchestrator.client import AsyncClient, Client, Unauthenticated, Unavailable
from conclave.orchestrator.config import GatewayConfig
from conclave.orchestrator.gateway.server import Gateway
from conclave.orchestrator.security.settings import SecurityConfig, TlsConfig, TokenConfig
from conclave.orchestrator.security.tokens import digest, new_token
from conclave.worker.errors import ConfigError

Run = Callable[[Any], None]
_times = itertools.count(1)


def write(path: Path, data: bytes) -> Path:
    """Writes a file that is newer than before, however coarse the file system's clock."""
    path.write_bytes(data)
    os.utime(path, ns=(0, next(_times)))
    return path


class Authority:
    """A certificate authority of this test, and a folder with what it has signed."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        made = self._build(self._name, self._key, authority=True)
        self.pem = made.public_bytes(Encoding.PEM)
        self.path = write(folder / f"{name}.pem", self.pem)

    def sign(self, name: str, passphrase: bytes | None = None) -> tuple[Path, Path]:
        """Writes a certificate and its key; returns where."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        pem = self._build(subject, key, authority=False).public_bytes(Encoding.PEM)
        lock = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
        certificate = write(self._folder / f"{name}.pem", pem)
        return certificate, write(self._folder / f"{name}.key", secret)

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "theirs")


def secured(authority: Authority, client_ca: Path | None = None) -> SecurityConfig:
    certificate, key = authority.sign("server")
    tls = TlsConfig(certificate=certificate, private_key=key, client_ca=client_ca)
    return SecurityConfig(tls=tls)


async def answered(fleet: Any, **credentials: Any) -> bool:
    """Whether a new connection gets an answer."""
    async with AsyncClient(fleet.gateway.address, timeout=10.0, **credentials) as client:
        try:
            return (await client.generate("hi")).worker == "w0"
        except Unavailable:
            return False


async def served_certificate(address: str) -> bytes:
    host, port = address.split(":")
    pem = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
    return pem.encode()


def test_a_client_trusts_its_authority_only(
    rig: Any, run: Run, ours: Authority, theirs: Authority
) -> None:
    async def scenario() -> None:
        async with rig(1, security=secured(ours)) as fleet:
            assert await answered(fleet, ca=ours.path)
            assert not await answered(fleet, ca=theirs.path)
            assert not await answered(fleet, ca="public")
            assert not await answered(fleet), "plain text must find nobody"

    run(scenario())


def test_clients_show_certificates(rig: Any, run: Run, ours: Authority, theirs: Authority) -> None:
    async def scenario() -> None:
        async with rig(1, security=secured(ours, client_ca=ours.path)) as fleet:
            for authority, welcome in ((ours, True), (theirs, False)):
                certificate, key = authority.sign("client")
                shown = {"ca": ours.path, "certificate": certificate, "private_key": key}
                assert await answered(fleet, **shown) is welcome
            assert not await answered(fleet, ca=ours.path)

    run(scenario())


def test_a_blocking_client_and_a_token(rig: Any, run: Run, ours: Authority) -> None:
    token = new_token()
    tokens = (TokenConfig(name="a", sha256=digest(token)),)
    both = secured(ours).model_copy(update={"tokens": tokens})

    def ask(address: str) -> None:
        with Client(address, ca=str(ours.path), token=token) as client:
            assert client.generate("hi").worker == "w0"
        with Client(address, ca=ours.path) as client, pytest.raises(Unauthenticated):
            client.generate("hi")

    async def scenario() -> None:
        async with rig(1, security=both) as fleet:
            await asyncio.to_thread(ask, fleet.gateway.address)

    run(scenario())


def test_a_new_certificate_needs_no_restart(
    rig: Any, run: Run, ours: Authority, theirs: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        security = secured(ours)
        assert security.tls is not None
        async with (
            rig(1, security=security) as fleet,
            AsyncClient(fleet.gateway.address, ca=ours.path) as early,
        ):
            assert await early.generate("hi")
            first = await served_certificate(fleet.gateway.address)
            assert first.split() == security.tls.certificate.read_bytes().split()
            theirs.sign("server")
            assert await answered(fleet, ca=theirs.path)
            assert not await answered(fleet, ca=ours.path)
            assert await early.generate("hi"), "an open connection goes on"
            for broken in (b"no certificate", b""):
                write(security.tls.certificate, broken)
                assert await answered(fleet, ca=theirs.path)
            # Half of a renewal: the new key lies beside the old certificate.
            certificate, _ = ours.sign("server")
            complete = certificate.read_bytes()
            certificate.unlink()
            assert await answered(fleet, ca=theirs.path)
            write(certificate, complete)
            assert await answered(fleet, ca=ours.path)

    run(scenario())
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("the certificate stays as it was" in w for w in warnings) >= 3
    assert "PRIVATE KEY" not in caplog.text and "BEGIN" not in caplog.text


def test_a_new_client_authority_needs_no_restart(
    rig: Any, run: Run, ours: Authority, theirs: Authority
) -> None:
    async def scenario() -> None:
        certificate, key = theirs.sign("client")
        shown = {"ca": ours.path, "certificate": certificate, "private_key": key}
        accepted = write(ours.path.parent / "clients.pem", ours.pem)
        async with rig(1, security=secured(ours, client_ca=accepted)) as fleet:
            assert not await answered(fleet, **shown)
            write(accepted, ours.pem + theirs.pem)
            assert await answered(fleet, **shown)
            write(accepted, b"nothing")
            assert await answered(fleet, **shown)

    run(scenario())


@pytest.mark.parametrize("wrong", ["missing", "not PEM", "another's key", "locked", "authority"])
def test_bad_files_are_told_at_the_start(run: Run, ours: Authority, wrong: str) -> None:
    certificate, key = ours.sign("server", b"passphrase" if wrong == "locked" else None)
    client_ca = None
    if wrong == "missing":
        key.unlink()
    if wrong == "not PEM":
        write(certificate, b"oops")
    if wrong == "another's key":
        key = ours.sign("other")[1]
    if wrong == "authority":
        client_ca = write(ours.path.parent / "clients.pem", b"oops")
    tls = TlsConfig(certificate=certificate, private_key=key, client_ca=client_ca)
    gateway = Gateway(GatewayConfig(port=0, security=SecurityConfig(tls=tls)))

    async def scenario() -> None:
        with pytest.raises(ConfigError, match="cannot use the certificate") as caught:
            await gateway.start()
        assert "oops" not in str(caught.value)
        await gateway.stop(0.0)

    run(scenario())


def test_a_client_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pem: cannot be read"):
        Client(ca=tmp_path / "nowhere.pem")
    with pytest.raises(ConfigError, match="needs its private key"):
        Client(certificate=tmp_path / "nowhere.pem")
