"""The section `gateway.security` of the fleet file, and whether a gateway so set may listen.

Paths start beside the fleet file. Nothing here is a secret: private keys are named, not held, and
of a token only its hash is written down.
"""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ...worker.config import is_loopback
from ...worker.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _beside_the_file(path: Path | None, info: ValidationInfo) -> Path | None:
    folder = (info.context or {}).get("folder")
    return path if path is None or folder is None else folder / path


class TlsConfig(_Section):
    """PEM files; when they change, new connections see the new ones."""

    certificate: Path
    """The gateway's certificate, followed by those between it and its authority."""
    private_key: Path
    """Its private key, without a passphrase."""
    client_ca: Path | None = None
    """Authorities of which every client must show a certificate; None asks for none."""

    _resolve = field_validator("certificate", "private_key", "client_ca")(_beside_the_file)


class Pace(_Section):
    """How many requests, and how fast. None is no limit."""

    requests_per_second: float | None = Field(default=None, gt=0)
    burst: int | None = Field(default=None, gt=0)
    """Requests that may come at once after a pause; None is those of one second."""
    max_concurrent: int | None = Field(default=None, gt=0)
    """Requests that may be open at a time."""

    @model_validator(mode="after")
    def _burst_has_a_rate(self) -> Self:
        if self.burst is not None and self.requests_per_second is None:
            raise ValueError("`burst` needs `requests_per_second`")
        return self


class TokenConfig(Pace):
    """One caller: the hash of its bearer token and what it may do. `conclave token` makes one."""

    name: str = Field(min_length=1)
    """Who it is, for messages."""
    sha256: str
    """Of the token, in hexadecimal."""
    max_message_bytes: int | None = Field(default=None, gt=0)
    """Largest request; beside `gateway.max_message_mib`, which holds for all."""
    max_tokens_per_request: int | None = Field(default=None, gt=0)
    """Most answer tokens a request may ask for, over all its `n` answers; it must then name
    `max_tokens`."""

    @field_validator("sha256")
    @classmethod
    def _is_a_hash(cls, text: str) -> str:
        text = text.lower()
        # Not a pattern of the field: its message would repeat what may be a token.
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            raise ValueError("must be 64 hexadecimal digits; `conclave token NAME` makes them")
        return text


class SecurityConfig(_Section):
    """Who may call the gateway. Without anything, everybody who reaches the loopback."""

    tls: TlsConfig | None = None
    tokens: tuple[TokenConfig, ...] = ()
    """With any, every call but a health check must carry one: `authorization: Bearer TOKEN`."""
    tokens_file: Path | None = None
    """A YAML list of the same, read again when it changes; instead of `tokens`."""
    total: Pace = Pace()
    """What all callers together may do."""
    insecure: bool = False
    """Listens beyond the loopback without protection, as `conclave serve --insecure` does."""

    _resolve = field_validator("tokens_file")(_beside_the_file)

    @model_validator(mode="after")
    def _one_list_of_tokens(self) -> Self:
        if self.tokens and self.tokens_file is not None:
            raise ValueError("give `tokens` or `tokens_file`, not both")
        check_names(self.tokens)
        return self

    @property
    def wants_tokens(self) -> bool:
        """Whether callers must show a token; an empty file lets nobody in."""
        return bool(self.tokens) or self.tokens_file is not None


def check_names(tokens: tuple[TokenConfig, ...]) -> None:
    """Raises ValueError if two tokens share a name or a hash."""
    for what in ("name", "sha256"):
        values = [getattr(token, what) for token in tokens]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"tokens must differ in `{what}`; given twice: {', '.join(twice)}")


def check_exposure(host: str, security: SecurityConfig) -> None:
    """Raises ConfigError if a gateway on `host` would be open to the network."""
    if security.insecure or is_loopback(host):
        return
    if security.tls is None:
        wrong = (
            "would send tokens and answers in the clear"
            if security.wants_tokens
            else ("would answer anybody on the network")
        )
        help = "set security.tls with a certificate, and security.tokens or security.tls.client_ca"
    elif security.tls.client_ca is None and not security.wants_tokens:
        wrong = "would answer anybody on the network"
        help = "set security.tokens (`conclave token NAME` makes one) or security.tls.client_ca"
    else:
        return
    raise ConfigError(
        f"a gateway on {host} {wrong}: {help}, listen on 127.0.0.1, or say --insecure; "
        "see docs/security.md"
    )
