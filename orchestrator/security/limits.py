"""How much a caller, or all of them, may do: a rate, and a number of requests at a time. No I/O.

Lives on the gateway's event loop, so nothing is locked.
"""

import math
import time
from collections.abc import Callable

from ...worker.errors import Overloaded
from .settings import Pace

CONCURRENCY_RETRY_SECONDS = 1.0
"""When to try again after too many at a time; how long the open ones take, nobody knows."""


class Gate:
    """Lets requests through at a given pace; each that entered must leave.

    Args:
        pace: the limits.
        whose: the subject of the messages, such as "the token `alice`".
        clock: seconds that only grow.
    """

    def __init__(self, pace: Pace, whose: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.open = 0
        """Requests inside."""
        self._pace = pace
        self._whose = whose
        self._clock = clock
        self._rate = pace.requests_per_second or 0.0
        self._burst = float(pace.burst or math.ceil(self._rate))
        self._level = self._burst
        self._filled = clock()

    def enter(self) -> None:
        """Counts one more request. Raises Overloaded, and counts nothing, if that is too much."""
        most = self._pace.max_concurrent
        if most is not None and self.open >= most:
            raise Overloaded(
                f"{self._whose} has {self.open} open requests, the most it may have; wait for one",
                CONCURRENCY_RETRY_SECONDS,
            )
        if self._rate:
            self._take()
        self.open += 1

    def leave(self) -> None:
        """One request has ended, in whatever way."""
        self.open -= 1

    def _take(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._filled) * self._rate)
        self._filled = now
        if self._level < 1.0:
            raise Overloaded(
                f"{self._whose} may send {self._rate:g} requests a second, and has sent more",
                (1.0 - self._level) / self._rate,
            )
        self._level -= 1.0
