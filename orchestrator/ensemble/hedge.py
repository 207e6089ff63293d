"""`hedge` and `single`: one answer, from whoever speaks first.

The second member is asked when the first token is late, within a budget (Dean and Barroso, "The
Tail at Scale", CACM 2013). Of all asks that are later than a quantile most are only a little late:
they may take no more than half of what the budget has saved, or nothing would be left for the few
that wait for a slow member. Who is refused tries again, with all of the budget. The loser is
cancelled the moment the other one speaks. gRPC's own hedging does not exist in Python, and could
not cancel by first token.
"""

from .calls import (
    Alarm,
    Ask,
    Broke,
    Command,
    Disarm,
    Drop,
    Ended,
    Heard,
    Mark,
    Rang,
    Say,
    Strategy,
    Verdict,
    View,
)

FOR_THE_LATEST = 0.5
"""The fraction of the reserve that is kept for asks whose first alarm was refused."""
SHORTEST_PAUSE = 0.01
"""Seconds between the alarms of one ask."""


def single(view: View) -> Strategy:
    """The first member answers; there is nobody else."""
    return hedge(View(view.weights[:1], 1, seed=view.seed), after=None)


def hedge(view: View, after: float | None) -> Strategy:
    """The members are asked one after the other, each `after` seconds after the one before.

    Args:
        view: the members, the first one first.
        after: seconds to wait for a first token; None never hedges, but still replaces a failure.
    """
    running = {0}
    commands: list[Command] = [Ask(0, 0, "answer", live=True)]
    asked, speaker = 1, None
    commands += _wait(after, asked, view.width)
    while True:
        reply = yield commands
        commands = []
        match reply:
            case Heard(call, event) if call in running:
                if speaker is None:
                    speaker = call
                    commands += [Disarm(), *(Drop(c) for c in running - {call})]
                    running = {call}  # what the losers have said meanwhile is not heard
                commands.append(Say(event))
            case Ended(call, answer) if call in running:
                marks = {call: Mark(agreed=True)}
                return Verdict(None, answer.end, None, marks, call)
            case Broke(call, error) if call in running:
                running.discard(call)
                if speaker is not None or (not running and asked == view.width):
                    raise error
                if not running:
                    commands.append(_next(running, asked))
                    asked += 1
                    commands += _wait(after, asked, view.width)
            case Rang(granted=granted) if speaker is None and asked < view.width:
                if granted:
                    commands.append(_next(running, asked))
                    asked += 1
                if asked < view.width and after is not None:
                    keep = FOR_THE_LATEST if granted else 0.0
                    commands.append(Alarm(max(after, SHORTEST_PAUSE), keep=keep))


def _next(running: set[int], asked: int) -> Ask:
    running.add(asked)
    return Ask(asked, asked, "hedge", live=True)


def _wait(after: float | None, asked: int, width: int) -> list[Command]:
    """For the one that was asked last, as long as there is another one to ask."""
    if after is None:
        return []
    return [Alarm(after, keep=FOR_THE_LATEST)] if asked < width else [Disarm()]
