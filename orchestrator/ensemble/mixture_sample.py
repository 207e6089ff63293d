"""`mixture_sample`: each token is sampled by one member, drawn by weight.

The distribution of the answer is exactly that of sampling from the weighted mean of the members'
distributions (Mixture equivalence, arXiv 2605.00419), at the price of one member's work a token.
Who speaks next does not depend on what was said, so a member gets its whole run of turns at once,
and catches up on the others' tokens by one prefill when its turn comes. Cuts (top-k and so on) and
penalties apply to each member's own distribution. Not for greedy decoding.
"""

from itertools import accumulate

from ...protos.ensemble_pb2 import TokenVote
from ...protos.generation_pb2 import Token
from ...worker.draws import split_mix, uniform
from ...worker.errors import InvalidRequest
from .calls import (
    Alarm,
    Command,
    Lost,
    Rang,
    Shut,
    Stepped,
    Strategy,
    Take,
    Tell,
    Verdict,
    View,
    raise_quorum,
)
from .stepping import REJOIN_SECONDS, Steppers, first_new

LATE, REJOIN = "late", "rejoin"
MOST_AT_ONCE = 16
"""Tokens of one run, so that streaming stays smooth when few members are left."""


def mixture_sample(view: View, timeout: float) -> Strategy:
    """One answer by all members in turns.

    Args:
        view: the members.
        timeout: seconds after which a member that has not done its run counts as lost.
    """
    steppers = Steppers(view)
    end, speaker = None, _speaker(steppers, 0, view.seed)
    commands: list[Command] = _turn(steppers, speaker, timeout)
    while end is None:
        reply = yield commands
        commands = []
        if isinstance(reply, Stepped) and reply.member == speaker:
            steppers.stepped(reply)
            _check_sampled(steppers)
            for record in first_new(reply, len(steppers.tokens)):
                steppers.add(record.id)
                commands.append(Tell(_signed(record, speaker)))
            steppers.members[speaker].known = reply.position
            end = reply.end
        elif isinstance(reply, Lost):
            _lose(steppers, reply)
            commands.append(Alarm(REJOIN_SECONDS, REJOIN))
            if reply.member != speaker:
                continue
        elif isinstance(reply, Rang) and reply.name == REJOIN:
            for stepper in steppers.members:  # opened again when its turn comes
                stepper.error = None
            continue
        elif isinstance(reply, Rang):
            late = TimeoutError(f"no word for {timeout:g} s")
            _lose(steppers, Lost(speaker, late))
            commands += [Shut(speaker, str(late)), Alarm(REJOIN_SECONDS, REJOIN)]
        else:
            continue
        if end is None:
            speaker = _speaker(steppers, len(steppers.tokens), view.seed)
            commands += _turn(steppers, speaker, timeout)
    return Verdict(None, end, None, steppers.marks(), speaker, last=commands)


def _speaker(steppers: Steppers, index: int, seed: int) -> int:
    """Whose turn the token at that place is, among those that have not failed."""
    able = [n for n, stepper in enumerate(steppers.members) if stepper.error is None]
    bounds = list(accumulate(steppers.members[number].weight for number in able))
    # Another stream of draws than the tokens' own, or the choice of member would steer them.
    number = uniform(split_mix(~seed), index) * bounds[-1]
    return next((able[i] for i, bound in enumerate(bounds) if number < bound), able[-1])


def _turn(steppers: Steppers, member: int, timeout: float) -> list[Command]:
    """Give a member the tokens it lacks and leave for its whole run."""
    start, seed = len(steppers.tokens), steppers.view.seed
    run = 1
    while run < MOST_AT_ONCE and _speaker(steppers, start + run, seed) == member:
        run += 1
    stepper = steppers.members[member]
    if not stepper.idle:
        return [steppers.open(member, generate=run), Alarm(timeout, LATE)]
    ids = steppers.missing(member)
    stepper.step = None
    return [Take(member, ids, run), Alarm(timeout, LATE)]


def _lose(steppers: Steppers, lost: Lost) -> None:
    stepper = steppers.members[lost.member]
    stepper.lost, stepper.step, stepper.error = True, None, lost.error
    # A member that has not had its turn yet is there as long as it has not failed.
    errors = [s.error for s in steppers.members if s.error is not None]
    raise_quorum(steppers.view, steppers.view.width - len(errors), errors)


def _check_sampled(steppers: Steppers) -> None:
    if steppers.sampling is not None and steppers.sampling.temperature == 0:
        raise InvalidRequest.of(
            "sampling.temperature",
            "is 0, but mixture_sample draws its tokens; raise it, or use fuse",
        )


def _signed(record: Token, member: int) -> Token:
    token = Token()
    token.CopyFrom(record)
    vote = TokenVote(member=member, agreed=True)
    if record.HasField("logprob"):
        vote.logprob = record.logprob
    token.votes.append(vote)
    return token
