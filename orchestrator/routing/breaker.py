"""A circuit breaker: after failures in a row a worker gets no asks for a while, then one to prove
itself. Pure; the caller tells the time.

Only failures of the worker count; what a client did wrong says nothing about it. Asks that fail
together, in one broken step or with one connection, are one failure: a further one counts only if
its ask was begun after the last.
"""

from dataclasses import dataclass

FAILURES = 5
"""In a row, until it opens."""
PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


@dataclass(slots=True)
class Breaker:
    """One worker's breaker; times are seconds on any steady clock."""

    failures: int = 0
    """In a row."""
    pause: float = PAUSE_SECONDS
    opened_until: float = 0.0
    probing: bool = False
    failed_at: float = float("-inf")
    """When the last failure that counted was seen."""

    @property
    def open(self) -> bool:
        """Whether it has tripped and not yet been proven well again."""
        return self.failures >= FAILURES

    def allows(self, now: float) -> bool:
        """Whether an ask may go to the worker."""
        return not self.open or (now >= self.opened_until and not self.probing)

    def begin(self) -> None:
        """An ask goes to the worker."""
        self.probing = self.open

    def success(self) -> None:
        """The worker has answered, or refused for a good reason."""
        self.failures, self.pause, self.probing = 0, PAUSE_SECONDS, False

    def give_up(self) -> None:
        """An ask ended without a word on the worker's health, such as by a cancel."""
        self.probing = False

    def failure(self, now: float, begun: float) -> None:
        """The worker has failed at an ask that was begun at that time."""
        self.probing = False
        if begun <= self.failed_at:
            return
        self.failures += 1
        self.failed_at = now
        if self.open:
            self.opened_until = now + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS)
