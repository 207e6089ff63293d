"""`cascade`: the cheap member first, the next one if it was unsure (FrugalGPT, Chen et al. 2023).

Sure is an answer whose mean log-probability a token reaches a threshold. What it costs: an
escalated ask pays for both. Only the last member's answer is streamed as it is made.
"""

from .calls import (
    Answer,
    Ask,
    Broke,
    Ended,
    Heard,
    Mark,
    Say,
    Strategy,
    Verdict,
    View,
    raise_quorum,
)


def cascade(view: View, min_mean_logprob: float) -> Strategy:
    """Members are asked in the order of the spec."""
    marks: dict[int, Mark] = {}
    answers: dict[int, Answer] = {}
    errors: list[Exception] = []
    for member in range(view.width):
        last = member == view.width - 1
        reply = yield (Ask(member, member, "answer", live=last),)
        spoke = False
        while isinstance(reply, Heard):
            spoke = True
            reply = yield (Say(reply.event),)
        if isinstance(reply, Broke):
            if spoke:
                raise reply.error
            errors.append(reply.error)
            continue
        assert isinstance(reply, Ended)
        answer = answers[member] = reply.answer
        sure = last or answer.mean_logprob >= min_mean_logprob
        marks[member] = Mark(agreed=sure, score=answer.mean_logprob)
        if sure:
            return Verdict(None if last else answer, answer.end, None, marks, member)
    raise_quorum(view, len(answers), errors)
    # The strongest failed: the surest of the unsure answers is better than none.
    best = max(answers, key=lambda member: answers[member].mean_logprob)
    marks[best] = Mark(agreed=True, score=answers[best].mean_logprob)
    return Verdict(answers[best], answers[best].end, None, marks, best)
