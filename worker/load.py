"""How busy an engine is: a snapshot that other threads may read, and a meter of recent speed."""

from collections import deque
from dataclasses import dataclass

from .memory.experts.cache import ExpertUse
from .memory.streaming.copies import StreamUse
from .running.caches import NarrowUse
from .scheduling.cache import PoolUse
from .scheduling.tier import TierUse

STALE = 1.0
"""Seconds after which the device is asked again."""
_WINDOW = 10.0
"""Seconds over which the speed is averaged."""


@dataclass(frozen=True, slots=True)
class Load:
    """State of an engine after its last step."""

    running: int = 0
    """Sequences on their way, parked ones too."""
    waiting: int = 0
    parked: int = 0
    """Of the running ones those that wait for their caller's next step."""
    outstanding_tokens: int = 0
    pools: tuple[PoolUse, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    tokens_per_second: float = 0.0
    narrow: tuple[NarrowUse, ...] = ()
    """For each pool, where keys and values are narrow; up to `STALE` seconds old."""
    host: tuple[TierUse, ...] = ()
    """For each pool, where what it forgets is kept on the host."""
    stream: StreamUse | None = None
    """Of layers that do not stay on the device."""
    experts: ExpertUse | None = None
    """Of single experts that do not; up to `STALE` seconds old."""


class Meter:
    """Counts since the start, and answer tokens a second over the last seconds."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.steps = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_tokens = 0

    def step(self, now: float, tokens: int) -> None:
        """Count one step that made `tokens` answer tokens."""
        self.steps += 1
        self.completion_tokens += tokens
        self._recent.append((now, tokens))
        self._recent_tokens += tokens
        self._forget(now)

    def rate(self, now: float) -> float:
        """Answer tokens a second."""
        self._forget(now)
        if not self._recent:
            return 0.0
        return self._recent_tokens / max(now - self._recent[0][0], 1e-3)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent_tokens -= self._recent.popleft()[1]
