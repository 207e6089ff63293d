"""Channels as callers open them: with or without TLS, and metadata that every call carries.

Interceptors could add the metadata, but put one more object around every call and every message.
Here it is an argument that is filled in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ...worker.config import FLEET_SECRET_KEY
from ...worker.errors import ConfigError

PUBLIC = "public"
"""Instead of a file: the public authorities that come with gRPC."""

Metadata = tuple[tuple[str, str], ...]
Options = Sequence[tuple[str, int]]
PathLike = str | Path | None


@dataclass(frozen=True, slots=True)
class Tls:
    """How a caller knows the gateway, and shows who it is."""

    ca: PathLike = None
    """PEM file of the authorities that may have signed the gateway's certificate, or `public`."""
    certificate: PathLike = None
    """PEM file of the caller's own certificate, for a gateway that asks for one."""
    private_key: PathLike = None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For gRPC; None without TLS. Raises ConfigError for files that cannot be read."""
        if self.ca is None and self.certificate is None and self.private_key is None:
            return None
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("a certificate needs its private key, and a private key needs one")
        authorities = None if self.ca in (None, PUBLIC) else _read(self.ca)
        return grpc.ssl_channel_credentials(
            authorities, _read(self.private_key), _read(self.certificate)
        )


PLAIN = Tls()


def open_channel(address: str, options: Options, tls: Tls = PLAIN) -> grpc.Channel:
    """A channel for a blocking stub."""
    credentials = tls.credentials()
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


def open_async_channel(address: str, options: Options, tls: Tls = PLAIN) -> grpc.aio.Channel:
    """A channel for an asyncio stub."""
    credentials = tls.credentials()
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)


def token_metadata(token: str | None) -> Metadata:
    """What shows a gateway whose call it is. Raises ConfigError for what cannot be a token."""
    if token is None:
        return ()
    # gRPC would refuse it with an error that repeats it.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("a token is printable ASCII without spaces; is this one cut or quoted?")
    return (("authorization", f"Bearer {token}"),)


def fleet_metadata(secret: str) -> Metadata:
    """What shows a worker that it is its own fleet that calls."""
    return ((FLEET_SECRET_KEY, secret),) if secret else ()


class WithMetadata:
    """A channel, for the blocking or the asyncio kind of stub, whose calls carry metadata."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel, metadata: Metadata) -> None:
        self._channel: Any = channel
        self._fill = _filler(metadata)

    def unary_unary(self, *method: Any, **serializers: Any) -> Any:
        """A call of one message each way."""
        return self._fill(self._channel.unary_unary(*method, **serializers))

    def unary_stream(self, *method: Any, **serializers: Any) -> Any:
        """A call answered by a stream."""
        return self._fill(self._channel.unary_stream(*method, **serializers))

    def stream_unary(self, *method: Any, **serializers: Any) -> Any:
        """A stream answered by one message."""
        return self._fill(self._channel.stream_unary(*method, **serializers))

    def stream_stream(self, *method: Any, **serializers: Any) -> Any:
        """A stream each way."""
        return self._fill(self._channel.stream_stream(*method, **serializers))


def _filler(metadata: Metadata) -> Callable[[Any], Any]:
    # Closures, because an attribute or a partial would show the token in a repr.
    def fill(call: Any) -> Any:
        if not metadata:
            return call

        def filled(*arguments: Any, **options: Any) -> Any:
            own: Sequence[tuple[str, str]] = options.pop("metadata", None) or ()
            return call(*arguments, metadata=(*own, *metadata), **options)

        return filled

    return fill


def _read(path: PathLike) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
