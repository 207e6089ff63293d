"""When the steps of a stub's simulated machine end.

Given up: catching up, once a stub is late by more than `LATE_SECONDS`.
"""

import time

from .exact_sleep import ExactSleep

LATE_SECONDS = 0.1
"""A stub this late gives up catching up with its own schedule."""


class Clock:
    """When the steps of a simulated machine end.

    The loop's sleep ends late, by a millisecond and more on a busy machine, which no real step
    does: what one step has taken too long is deducted from the next one. The same for all that is
    stepped, by the worker itself or from outside.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._late = 0.0
        self._sleep = ExactSleep()

    def begin(self) -> None:
        """A step begins now, and not with the end of the last one."""
        self._began = time.monotonic()

    def close(self) -> None:
        """Give the timer back."""
        self._sleep.close()

    async def step(self, seconds: float) -> float:
        """Until the end of the present step, with which the next one begins; returns what it took
        in truth."""
        due = self._began + seconds - self._late
        await self._sleep.until(due)
        began, self._began = self._began, time.monotonic()
        self._late = min(self._began - due, LATE_SECONDS)
        return self._began - began
