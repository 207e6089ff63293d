"""Sleeping to within tens of microseconds; an event loop's own timers are a millisecond coarse.

A Linux timerfd: a file that becomes readable at the set time, so the loop wakes for it as for any
message, without a thread.
"""

import asyncio
import ctypes
import os

_CLOCK_MONOTONIC = 1
_ABSOLUTE = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Times(ctypes.Structure):
    """struct itimerspec: an interval of zero, then when it rings."""

    _fields_ = [(name, ctypes.c_long) for name in ("_s", "_ns", "seconds", "nanoseconds")]


class ExactSleep:
    """A timer of one event loop; one sleeper at a time. Close it after use."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._file = _LIBC.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop.add_reader(self._file, self._ring)
        self._sleeper: asyncio.Future[None] | None = None

    async def until(self, due: float) -> None:
        """Until that time on the monotonic clock, in seconds; at once if it has passed."""
        nanoseconds = max(1, int(due * 1e9))
        times = _Times(0, 0, *divmod(nanoseconds, 1_000_000_000))
        self._sleeper = self._loop.create_future()
        _LIBC.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(times), None)
        await self._sleeper

    def close(self) -> None:
        """Gives the timer back."""
        self._loop.remove_reader(self._file)
        os.close(self._file)

    def _ring(self) -> None:
        os.read(self._file, 8)
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)
