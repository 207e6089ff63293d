"""The errors a user of a worker can cause or meet; each message says what to do.

ConclaveError
├── CheckpointError (ValueError)   a checkpoint cannot be loaded or run
├── ConfigError     (ValueError)   settings that cannot work together or on this machine
├── InvalidRequest  (ValueError)   a request breaks a rule; names every field that does
├── Overloaded                     the queue is full; says when to try again
├── Unavailable                    the worker is draining, stopped or broken
├── Unauthenticated                the caller has not shown who it is
├── DeadlineExceeded               the request's time ran out
└── Cancelled                      the caller gave the request up
"""

from dataclasses import dataclass


class ConclaveError(Exception):
    """Base of all errors that Conclave raises on purpose."""


class CheckpointError(ConclaveError, ValueError):
    """A checkpoint cannot be loaded or run."""


class ConfigError(ConclaveError, ValueError):
    """Settings that cannot work together or on this machine."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: the field's path in the request, and what is wrong with it."""

    field: str
    description: str


class InvalidRequest(ConclaveError, ValueError):
    """A request breaks at least one rule."""

    def __init__(self, violations: list[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))

    @classmethod
    def of(cls, field: str, description: str) -> "InvalidRequest":
        """An error about a single field."""
        return cls([Violation(field, description)])


class Overloaded(ConclaveError):
    """The queue is full."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which a retry is worth it."""


class Unavailable(ConclaveError):
    """The worker is draining, stopped or broken; another one may answer."""


class Unauthenticated(ConclaveError):
    """The caller has shown no token or secret, or one that is not known here."""


class DeadlineExceeded(ConclaveError):
    """The request's time ran out."""


class Cancelled(ConclaveError):
    """The caller gave the request up."""
