"""`best_of`: of several candidates the likeliest, by its own member or by all of them.

Ranked by mean log-likelihood a token, because a sum would favour short answers. Across members the
mean of the means is taken, own member included, so no member is its own only judge. Only the winner
is streamed, after the ranking.
"""

from collections.abc import Generator, Sequence

from ...worker.draws import split_mix
from .calls import (
    Ask,
    Broke,
    Command,
    Judge,
    Judged,
    Mark,
    Reply,
    Strategy,
    Verdict,
    View,
    raise_quorum,
)
from .collecting import Collected, collect


def best_of(view: View, samples: int, cross: bool) -> Strategy:
    """Samples are dealt out over the members in turn, each with a seed of its own."""
    asks = [
        Ask(call, call % view.width, "candidate", seed=split_mix(view.seed + call))
        for call in range(samples)
    ]
    collected = yield from collect(view, asks)
    raise_quorum(view, collected.answered, list(collected.errors.values()))
    scores = {call: answer.mean_logprob for call, answer in collected.answers.items()}
    if cross and len(collected.answers) > 1:
        scores = yield from _judged(view, collected, first_call=samples)
    winner = max(scores, key=lambda call: scores[call])
    marks = {call: Mark(agreed=call == winner, score=score) for call, score in scores.items()}
    chosen = collected.answers[winner]
    return Verdict(chosen, chosen.end, None, marks, winner)


def _judged(
    view: View, collected: Collected, first_call: int
) -> Generator[Sequence[Command], Reply, dict[int, float]]:
    """Every candidate's mean over all members; a member that cannot judge is left out."""
    means = {call: [answer.mean_logprob] for call, answer in collected.answers.items()}
    judged: dict[int, list[int]] = {}
    commands: list[Command] = []
    for member in range(view.width):
        others = [call for call in means if collected.members[call] != member]
        failed = any(collected.members[call] == member for call in collected.errors)
        if others and not failed:
            call = first_call + member
            judged[call] = others
            answers = tuple(collected.answers[other] for other in others)
            commands.append(Judge(call, member, "score", answers))
    while judged:
        reply = yield commands
        commands = []
        if isinstance(reply, Judged):
            for call, mean in zip(judged.pop(reply.call), reply.means, strict=True):
                means[call].append(mean)
        elif isinstance(reply, Broke):
            judged.pop(reply.call, None)
    return {call: sum(each) / len(each) for call, each in means.items()}
