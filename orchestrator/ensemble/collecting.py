"""Asking all members for whole answers, and knowing when enough are there."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

from .calls import Answer, Ask, Broke, Command, Ended, Reply, View


@dataclass(slots=True)
class Collected:
    """What has come of the calls so far."""

    members: dict[int, int]
    """The member of each call."""
    answers: dict[int, Answer] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)

    @property
    def open(self) -> list[int]:
        """Calls without an end."""
        return [c for c in self.members if c not in self.answers and c not in self.errors]

    @property
    def answered(self) -> int:
        """Members with at least one answer."""
        return len({self.members[call] for call in self.answers})

    @property
    def done(self) -> int:
        """Members of which no call is open, and that have answered."""
        busy = {self.members[call] for call in self.open}
        return len({self.members[call] for call in self.answers} - busy)


def collect(
    view: View,
    asks: Iterable[Ask],
    certain: Callable[[Collected], bool] = lambda _: False,
) -> Generator[Sequence[Command], Reply, Collected]:
    """Ask; return once all calls have ended, the outcome is certain, or a hasty quorum is met."""
    asks = tuple(asks)
    collected = Collected({ask.call: ask.member for ask in asks})
    commands: Sequence[Command] = asks
    while collected.open:
        reply = yield commands
        commands = ()
        if isinstance(reply, Ended):
            collected.answers[reply.call] = reply.answer
        elif isinstance(reply, Broke):
            collected.errors[reply.call] = reply.error
        if certain(collected) or (view.hasty and collected.done >= view.quorum):
            break
    return collected
