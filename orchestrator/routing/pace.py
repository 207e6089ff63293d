"""How fast a worker is, from its successive heartbeats. Pure.

Measured is the rate of one stream: it falls as the worker fills up, so work flows to where the next
token comes sooner, on unequal GPUs and unequally compressed models alike.
"""

from dataclasses import dataclass

from .registry import Beat


@dataclass(slots=True)
class Pace:
    """What the last heartbeat said; time in seconds on any steady clock."""

    at: float = 0.0
    running: int = 0
    completed: int = 0

    def beat(
        self, *, now: float, running: int, completed: int, outstanding: int, rate: float
    ) -> Beat:
        """Takes a heartbeat.

        Args:
            now: when it arrived.
            running: sequences in the present step.
            completed: answer tokens since the worker's start.
            outstanding: tokens still to compute.
            rate: answer tokens a second over the last seconds.
        """
        speed, idle = None, not (self.running or running)
        if self.at and self.running and running and now > self.at:
            streams = (self.running + running) / 2
            speed = max(0, completed - self.completed) / (streams * (now - self.at))
        self.at, self.running, self.completed = now, running, completed
        return Beat(outstanding, rate, speed or None, idle)
