"""The gateway's certificate as gRPC wants it, read again when its files change.

gRPC asks before every handshake, so a renewed certificate needs no restart and no signal: new
connections see it, open ones go on with what they have. Three calls of `stat` is what that costs.
"""

import logging
import ssl

import grpc

from ...worker.errors import ConfigError
from .files import version_of
from .settings import TlsConfig

log = logging.getLogger(__name__)


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Credentials that follow the files. Raises ConfigError if these are not good now."""
    certificates = _Certificates(tls)
    return grpc.dynamic_ssl_server_credentials(
        certificates.now,
        certificates.fetch,  # type: ignore[arg-type]  # None, "no change", is missing in the stubs
        require_client_authentication=tls.client_ca is not None,
    )


class _Certificates:
    """What the files said when they were last good."""

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._paths = [p for p in (tls.certificate, tls.private_key, tls.client_ca) if p]
        self._version = version_of(*self._paths)
        self.now = self._read()

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificate, or None for no change; called by gRPC in a thread of its own."""
        version = version_of(*self._paths)
        if version == self._version:
            return None
        self._version = version
        try:
            self.now = self._read()
        except ConfigError as error:
            log.warning("the certificate stays as it was: %s", error)
            return None
        log.info("read the certificate %s", self._tls.certificate)
        return self.now

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """Raises ConfigError, which names the file and never tells what is in it."""
        check_pair(self._tls)
        read = [path.read_bytes() for path in self._paths]
        certificate, key, authorities = (*read, None)[:3]
        assert certificate is not None and key is not None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)


def check_pair(tls: TlsConfig) -> None:
    """Raises ConfigError unless the files can be read and the key is the certificate's.

    Asked of Python's own TLS, because gRPC only says at a handshake, and to nobody, what is wrong.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A passphrase, though none is right: without one OpenSSL would ask the terminal.
        context.load_cert_chain(tls.certificate, tls.private_key, password="")
    except (OSError, ValueError) as error:
        raise _bad(f"{tls.certificate} with the key {tls.private_key}", error) from None
    try:
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
    except (OSError, ValueError) as error:
        raise _bad(str(tls.client_ca), error) from None


def _bad(files: str, error: Exception) -> ConfigError:
    # The library's words alone: `error` may hold file contents in no case known, and shall in none.
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "not PEM"
    return ConfigError(f"cannot use the certificate {files}: {reason}")
