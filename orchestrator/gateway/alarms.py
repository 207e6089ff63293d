"""The alarms of one answer.

A ring waits in the queue of replies for its turn, and what came before it may make it void: the
alarm was disarmed or set anew. Only a ring that still counts may cost anything.
"""

import asyncio
from collections.abc import Callable

from ..ensemble.calls import Alarm


class Ring:
    """An alarm that is set, and later its ringing.

    Args:
        alarm: what a strategy asked for.
        reply: takes the ring when its time has come.
    """

    def __init__(self, alarm: Alarm, reply: "Callable[[Ring], None]") -> None:
        self.alarm = alarm
        self.timer = asyncio.get_running_loop().call_later(alarm.seconds, reply, self)


class Alarms:
    """At most one of each name is set.

    Args:
        reply: takes rings, in the order of all replies.
    """

    def __init__(self, reply: Callable[[Ring], None]) -> None:
        self._reply = reply
        self._set: dict[str, Ring] = {}

    def arm(self, alarm: Alarm) -> None:
        """Set an alarm, in place of the one of the same name."""
        self.disarm(alarm.name)
        self._set[alarm.name] = Ring(alarm, self._reply)

    def disarm(self, name: str) -> None:
        """The alarm does not ring; if it has, the ring is void."""
        ring = self._set.pop(name, None)
        if ring is not None:
            ring.timer.cancel()

    def take(self, ring: Ring) -> bool:
        """Whether a ring still counts, now that its turn has come; it does so once."""
        if self._set.get(ring.alarm.name) is not ring:
            return False
        del self._set[ring.alarm.name]
        return True

    def stop(self) -> None:
        """Disarm all."""
        for name in tuple(self._set):
            self.disarm(name)
