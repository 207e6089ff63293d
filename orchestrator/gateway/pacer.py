"""How often a stream may be written to, so that one event loop is enough for all of them.

Nearly all that a streamed token costs here is the write of its event, whatever stands in it. So all
streams together get a set number of events a second; the tokens that arrive meanwhile ride in one.
A few streams never notice. What it gives up: beyond that number, one token an event.
"""

EVENTS_PER_SECOND = 5000.0
"""About half of what a core can write."""


class Pacer:
    """Shared by all streams of a gateway."""

    def __init__(self) -> None:
        self.streams = 0
        """Open now; whoever opens and closes one counts."""

    @property
    def pause(self) -> float:
        """Seconds from one event of a stream to its next."""
        return self.streams / EVENTS_PER_SECOND
