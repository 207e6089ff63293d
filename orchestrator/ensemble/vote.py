"""`vote`: the answer that most samples agree on (self-consistency, Wang et al., ICLR 2023).

Ends early once the majority cannot change any more. Among the samples on the winning side the one
that was likeliest to its own member is given. What it gives up: nothing is streamed before the end,
because a leader may still lose.
"""

import re
import string
from collections import defaultdict
from collections.abc import Callable, Mapping

from ...worker.draws import split_mix
from .calls import Ask, Mark, Strategy, Verdict, View, raise_quorum
from .collecting import Collected, collect


def vote(view: View, samples: int, extract: str | None, normalize: bool) -> Strategy:
    """Samples are dealt out over the members in turn, each with a seed of its own."""
    asks = [
        Ask(call, call % view.width, "candidate", seed=split_mix(view.seed + call))
        for call in range(samples)
    ]

    def answers(collected: Collected) -> dict[int, str]:
        found = {c: answer_of(a.text, extract, normalize) for c, a in collected.answers.items()}
        return {call: answer for call, answer in found.items() if answer is not None}

    def weight(call: int) -> float:
        return view.weights[call % view.width]

    def certain(collected: Collected) -> bool:
        left = sum(weight(call) for call in collected.open)
        quorum = collected.answered >= view.quorum
        return quorum and is_decided(tally(answers(collected), weight_of=weight), left)

    collected = yield from collect(view, asks, certain)
    raise_quorum(view, collected.answered, list(collected.errors.values()))
    votes = answers(collected)
    totals = tally(votes, weight_of=weight)
    leader = max(totals, key=lambda answer: totals[answer]) if totals else None
    side = [c for c in collected.answers if votes.get(c) == leader]
    winner = max(side, key=lambda call: collected.answers[call].mean_logprob)
    marks = {c: Mark(agreed=c in side, answer=votes.get(c, "")) for c in collected.answers}
    chosen = collected.answers[winner]
    share = totals[leader] / sum(totals.values()) if leader is not None else None
    return Verdict(chosen, chosen.end, share, marks, winner)


def answer_of(text: str, extract: str | None, normalize: bool) -> str | None:
    """What a text says, for comparing; None if `extract` finds nothing in it."""
    if extract is not None:
        found = list(re.finditer(extract, text))
        if not found:
            return None
        groups = found[-1].groups()
        text = next((group for group in groups if group is not None), found[-1].group())
    if not normalize:
        return text
    return " ".join(text.casefold().split()).strip(string.punctuation + string.whitespace)


def tally(votes: Mapping[int, str], weight_of: Callable[[int], float]) -> dict[str, float]:
    """The weight behind each answer, in the order in which they came."""
    totals: dict[str, float] = defaultdict(float)
    for call, answer in votes.items():
        totals[answer] += weight_of(call)
    return dict(totals)


def is_decided(totals: Mapping[str, float], left: float) -> bool:
    """Whether the weight still to come cannot change or tie the majority."""
    best, *rest = sorted(totals.values(), reverse=True) or [0.0]
    second = rest[0] if rest else 0.0
    return best > second + left
