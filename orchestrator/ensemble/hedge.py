"""`hedge` and `single`: one answer, from whoever speaks first.

The second member is asked when the first token is late, within a budget (Dean and Barroso, "The
Tail at Scale", CACM 2013). The loser is cancelled the moment the other one speaks. gRPC's own
hedging does not exist in Python, and could not cancel by first token.
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
    if after is not None and view.width > 1:
        commands.append(Alarm(after))
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
            case Rang(granted=granted) if speaker is None and asked < view.width:
                if granted:
                    commands.append(_next(running, asked))
                    asked += 1
                    if asked < view.width and after is not None:
                        commands.append(Alarm(after))


def _next(running: set[int], asked: int) -> Ask:
    running.add(asked)
    return Ask(asked, asked, "hedge", live=True)
