"""Which worker answered a session last. Pure."""

from collections import OrderedDict


class Sessions:
    """The last worker of each session.

    Args:
        capacity: sessions to remember; the least recently used one is forgotten first.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[str, str] = OrderedDict()

    def find(self, session: str) -> str:
        """The session's worker; empty if it is not known."""
        return self._workers.get(session, "")

    def note(self, session: str, worker: str) -> None:
        """The session has gone to that worker."""
        self._workers[session] = worker
        self._workers.move_to_end(session)
        if len(self._workers) > self._capacity:
            self._workers.popitem(last=False)
