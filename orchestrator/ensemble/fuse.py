"""`fuse`: in lockstep, one token chosen from all members' combined distribution.

A token is chosen when every present member has told its distribution, or when the slow ones have
had their time and the quorum is there. Who is late goes on and is given what it missed as one
prefill; who is lost is opened again, perhaps elsewhere, with the answer so far. The text and the
end of the answer come from the first member that has taken a token: all have the same tokenizer.
"""

from collections.abc import Sequence

from ...protos.ensemble_pb2 import TokenVote
from ...protos.generation_pb2 import OutputEnd, Token
from .calls import Alarm, Command, Lost, Rang, Stepped, Strategy, Take, Tell, Verdict, View
from .combining import Fused, Told, choose, combine
from .stepping import REJOIN_SECONDS, Steppers, first_new, rules_of

LATE, REJOIN = "late", "rejoin"


class _Fuse:
    """The state of one fused answer."""

    def __init__(self, view: View, candidates: int, product: bool, timeout: float) -> None:
        self.all = Steppers(view)
        self.end: OutputEnd | None = None
        self._view = view
        self._candidates = candidates
        self._product = product
        self._timeout = timeout
        self._told = 0
        """Tokens of which the caller has been told."""
        self._ballots: list[dict[int, Told]] = []
        """The members' distributions that each token was chosen from, until it is told."""
        self._cast = 0
        self._fused: list[tuple[Fused, int] | None] = []
        """What each token was chosen from, if the caller asked for log-probabilities."""
        self._heard: dict[int, Told] = {}
        """Each member's last distribution; read while the others are awaited, not after."""
        self._late = False
        self._agreed = 0

    @property
    def agreement(self) -> float | None:
        """The fraction of votes that would have chosen the same token."""
        return self._agreed / self._cast if self._cast else None

    def begin(self) -> list[Command]:
        members = range(self._view.width)
        return [*(self.all.open(m, self._candidates) for m in members), self._alarm()]

    def take(self, reply: object) -> list[Command]:
        """What follows from a reply."""
        commands: list[Command] = []
        match reply:
            case Stepped():
                self.all.stepped(reply)
                if self._is_here(reply):
                    self._hear(reply)
                commands += self._tell(reply)
                if self.end is None and reply.position < len(self.all.tokens):
                    commands += self._give([reply.member])  # it was late, or is new
            case Lost():
                self.all.lose(reply)
                commands.append(Alarm(REJOIN_SECONDS, REJOIN))
            case Rang(name="rejoin"):
                commands += self.all.rejoin(self._candidates)
            case Rang():
                self._late = True
        if self.end is None and self._is_ready():
            commands += self._next()
        return commands

    def _tell(self, step: Stepped) -> list[Command]:
        """Tell the caller of tokens that a member is the first to have taken."""
        commands: list[Command] = []
        for record in first_new(step, self._told):
            votes = self._vote(self._told, record.id)
            token = Token(id=record.id, text=record.text, votes=votes)
            self._describe(token)
            self._fused[self._told] = None
            self._told += 1
            commands.append(Tell(token))
        if step.end is not None and self._told == step.position == len(self.all.tokens):
            self.end = step.end
        return commands

    def _describe(self, token: Token) -> None:
        """Give a token its log-probability under the fused distribution, if that was asked."""
        told = self._fused[self._told]
        if told is None:
            return
        assert self.all.sampling is not None
        fused, chosen = told
        position = fused.ids.index(chosen)
        token.logprob, token.rank = fused.logprobs[position], position + 1
        for place in range(min(self.all.sampling.logprobs, len(fused.ids))):
            token.candidates.add(id=fused.ids[place], logprob=fused.logprobs[place])

    def _is_ready(self) -> bool:
        here = [self._is_here(s.step) for s in self.all.members]
        awaited = [s.present and not there for s, there in zip(self.all.members, here, strict=True)]
        if sum(here) < self._view.quorum:
            return False
        return self._late or not any(awaited)

    def _is_here(self, step: Stepped | None) -> bool:
        return step is not None and step.position == len(self.all.tokens) and len(step.ids) > 0

    def _next(self) -> list[Command]:
        """Choose a token and give it to everybody who is here."""
        here = [n for n, s in enumerate(self.all.members) if self._is_here(s.step)]
        ballots = {number: self._heard[number] for number in here}
        fused = combine(tuple(ballots.values()), self._product)
        assert self.all.sampling is not None
        rules = rules_of(self.all.sampling)
        banned = self.all.banned(self.all.stops)
        chosen = choose(fused, rules, len(self.all.tokens), self.all.counts, banned)
        self._ballots.append(ballots)
        asked = self.all.sampling.HasField("logprobs")
        self._fused.append((fused, chosen) if asked else None)
        self.all.add(chosen)
        self._late = False
        for number, stepper in enumerate(self.all.members):
            stepper.present = number in here
        return [*self._give(here), self._alarm()]

    def _hear(self, step: Stepped) -> None:
        stepper = self.all.members[step.member]
        told = Told(step.ids, step.logprobs, stepper.vocabulary, stepper.weight)
        self._heard[step.member] = told

    def _vote(self, index: int, chosen: int) -> list[TokenVote]:
        """What the members had said of a token; asked for while they make the next one."""
        votes = []
        for number, told in self._ballots[index].items():
            agreed = told.favourite == chosen
            self.all.members[number].dissents += not agreed
            self._agreed += agreed
            self._cast += 1
            logprob = told.logprob(chosen)
            votes.append(TokenVote(member=number, logprob=logprob, agreed=agreed))
        self._ballots[index] = {}
        return votes

    def _give(self, members: Sequence[int]) -> list[Command]:
        commands: list[Command] = []
        for number in members:
            ids = self.all.missing(number)
            stepper = self.all.members[number]
            stepper.step, stepper.known = None, len(self.all.tokens)
            commands.append(Take(number, ids))
        return commands

    def _alarm(self) -> Alarm:
        return Alarm(self._timeout, LATE)


def fuse(view: View, candidates: int, product: bool, timeout: float) -> Strategy:
    """One answer by all members together.

    Args:
        view: the members.
        candidates: how many tokens each tells.
        product: combine log-probabilities instead of probabilities.
        timeout: seconds after which a token is chosen without the members that are late.
    """
    state = _Fuse(view, candidates, product, timeout)
    commands = state.begin()
    while state.end is None:
        reply = yield commands
        commands = state.take(reply)
    return Verdict(None, state.end, state.agreement, state.all.marks(), last=commands)
