"""Bearer tokens: making one, and telling whose a presented one is.

A token is 32 random bytes, so nobody can try its hashes through: one SHA-256 is as good as a slow
password hash, and takes a microsecond of the gateway's loop instead of a tenth of a second.
"""

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ...worker.errors import ConfigError
from .files import version_of
from .limits import Gate
from .settings import SecurityConfig, TokenConfig, check_names

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the tokens file is looked at, while calls come."""

_LIST = TypeAdapter(tuple[TokenConfig, ...])


def new_token() -> str:
    """A random token. Its beginning tells people, and scanners for leaked secrets, what it is."""
    return "conclave_" + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """What is written down of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


class Caller:
    """One who has a token: its settings, and what it has open."""

    def __init__(self, config: TokenConfig) -> None:
        self.config = config
        self.gate = Gate(config, f"the token `{config.name}`")
        self.hash = bytes.fromhex(config.sha256)
        self.handlers: dict[str, tuple[Any, Any]] = {}
        """Of each method its handler, and that one counted for this caller; the interceptor's."""


class Callers:
    """Everybody who may call.

    Raises ConfigError at the start if the tokens file cannot be read; a file that breaks later
    leaves the tokens as they are, and is logged.
    """

    def __init__(
        self, security: SecurityConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = security.tokens_file
        self._clock = clock
        self._callers: tuple[Caller, ...] = ()
        self._version: object = None
        self._looked = clock()
        if self._path is None:
            self._replace(security.tokens)
        else:
            self._version = version_of(self._path)
            self._replace(read_tokens(self._path))

    def find(self, token: str) -> Caller | None:
        """Whose token this is. Takes as long whether it is known or not."""
        if self._path is not None and self._clock() - self._looked >= LOOK_SECONDS:
            self._look(self._path)
        presented = hashlib.sha256(token.encode()).digest()
        found = None
        for caller in self._callers:
            if hmac.compare_digest(presented, caller.hash):
                found = caller
        return found

    def _look(self, path: Path) -> None:
        self._looked = self._clock()
        version = version_of(path)
        if version == self._version:
            return
        self._version = version
        try:
            self._replace(read_tokens(path))
            log.info("read %d tokens from %s", len(self._callers), path)
        except ConfigError as error:
            log.warning("the tokens stay as they were: %s", error)

    def _replace(self, configs: tuple[TokenConfig, ...]) -> None:
        """Whoever stays as it was keeps its open requests and its rate."""
        known = {caller.config: caller for caller in self._callers}
        self._callers = tuple(known.get(config) or Caller(config) for config in configs)


def read_tokens(path: Path) -> tuple[TokenConfig, ...]:
    """The tokens of a file. Raises ConfigError, which says where it is wrong, never what it has."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        tokens = _LIST.validate_python(data or ())
        check_names(tokens)
    except ValidationError as error:
        places = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {'; '.join(places)}") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f", line {line + 1}" if line is not None else ""
        raise ConfigError(f"{path}{where}: is not YAML") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return tokens
