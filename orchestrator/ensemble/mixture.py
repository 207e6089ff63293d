"""`mixture`: members propose, one of them writes the answer with the drafts before its eyes.

Mixture of agents (Wang et al. 2024), one layer. The aggregator's answer is streamed as it is made,
so the first token comes after the slowest proposer that was waited for. What it needs: a prompt as
text or as a chat, and an aggregator that can follow an instruction.
"""

from collections.abc import Iterable

from ...protos.generation_pb2 import Prompt
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
from .collecting import collect

TEMPLATE = """{prompt}

Below are drafts of an answer by different writers. Some may be wrong. Write one better answer.

{drafts}

Answer:
"""


def mixture(view: View, prompt: Prompt, aggregator: int, template: str) -> Strategy:
    """Everybody but the aggregator proposes; call numbers are the members'."""
    proposers = [member for member in range(view.width) if member != aggregator]
    asks = [Ask(member, member, "draft") for member in proposers]
    needed = View(view.weights, min(view.quorum, len(proposers)), view.hasty, view.seed)
    collected = yield from collect(needed, asks)
    raise_quorum(needed, collected.answered, list(collected.errors.values()))
    drafts = [collected.answers[member] for member in proposers if member in collected.answers]
    marks = {member: Mark(agreed=True) for member in collected.answers}
    full = with_drafts(prompt, template, drafts)
    reply = yield (Ask(aggregator, aggregator, "answer", live=True, prompt=full),)
    # Proposers that were not waited for may still speak in between.
    while not (isinstance(reply, Ended | Broke) and reply.call == aggregator):
        reply = yield (Say(reply.event),) if isinstance(reply, Heard) else ()
    if isinstance(reply, Broke):
        raise reply.error
    marks[aggregator] = Mark(agreed=True)
    return Verdict(None, reply.answer.end, None, marks, aggregator)


def with_drafts(prompt: Prompt, template: str, drafts: Iterable[Answer]) -> Prompt:
    """The prompt that the aggregator reads: in a chat, the last turn carries the drafts."""
    listed = "\n\n".join(
        f"Draft {number}:\n{draft.text.strip()}" for number, draft in enumerate(drafts, 1)
    )
    full = Prompt()
    full.CopyFrom(prompt)
    if full.WhichOneof("input") == "text":
        full.text = _fill(template, full.text, listed)
    else:
        last = full.chat.messages[-1]
        last.content = _fill(template, last.content, listed)
    return full


def _fill(template: str, prompt: str, drafts: str) -> str:
    """Not str.format: braces in a template are the caller's own."""
    before, marker, after = template.partition("{drafts}")
    return (
        before.replace("{prompt}", prompt)
        + (drafts if marker else "")
        + after.replace("{prompt}", prompt)
    )
