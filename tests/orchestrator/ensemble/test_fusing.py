"""Token-level strategies against the same arithmetic done plainly in one place."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy
import pytest

from conclave.orchestrator.ensemble.calls import (
    Alarm,
    Command,
    Lost,
    Open,
    QuorumNotMet,
    Rang,
    Reply,
    Shut,
    Stepped,
    Strategy,
    Take,
    Tell,
    Verdict,
    View,
)
from conclave.orchestrator.ensemble.combining import Rules, Told, choose, combine
from conclave.orchestrator.ensemble.fuse import fuse
from conclave.orchestrator.ensemble.mixture_sample import mixture_sample
from conclave.protos.generation_pb2 import FINISH_REASON_LENGTH, OutputEnd, SamplingParams, Token
from conclave.protos.worker_pb2 import StepOpened
from conclave.worker.draws import uniform
from conclave.worker.errors import InvalidRequest

VOCABULARY = 12
Row = numpy.ndarray


class Table:
    """A member whose distribution depends on its number and on the answer so far."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.answer: list[int] = []

    def logprobs(self) -> Row:
        seed = hash((self.number, *self.answer)) % 2**32
        logits = numpy.random.default_rng(seed).normal(size=VOCABULARY) * 2
        return numpy.asarray(logits - numpy.log(numpy.exp(logits).sum()))


class Members:
    """Carries out what a strategy asks of tables."""

    def __init__(self, count: int, length: int, sampling: SamplingParams) -> None:
        self.tables = [Table(number) for number in range(count)]
        self.length = length
        self.sampling = sampling
        self.candidates = VOCABULARY
        self.takes: list[Take] = []
        self.told: list[Token] = []

    def opened(self) -> StepOpened:
        return StepOpened(vocab_size=VOCABULARY, sampling=self.sampling, tokenizer_fingerprint="t")

    def reply(self, command: Command) -> Reply | None:
        if isinstance(command, Tell):
            self.told.append(command.token)
        if isinstance(command, Open):
            self.candidates = command.candidates
            self.tables[command.member].answer = list(command.made)
            return self._stepped(command.member, [], command.generate, self.opened())
        if isinstance(command, Take):
            self.takes.append(command)
            self.tables[command.member].answer += command.ids
            return self._stepped(command.member, command.ids, command.generate, None)
        return None

    def _stepped(
        self, member: int, taken: Sequence[int], generate: int, opened: StepOpened | None
    ) -> Stepped:
        table, ids = self.tables[member], list(taken)
        for _ in range(generate):
            if len(table.answer) < self.length:
                cumulative = numpy.exp(table.logprobs()).cumsum()
                number = uniform(self.sampling.seed, len(table.answer)) * cumulative[-1]
                ids.append(int(numpy.searchsorted(cumulative, number, side="right")))
                table.answer.append(ids[-1])
        tokens = tuple(Token(id=each, text=f"{each} ") for each in ids)
        position = len(table.answer)
        if position >= self.length:
            end = OutputEnd(reason=FINISH_REASON_LENGTH, completion_tokens=position)
            return Stepped(member, position, tokens, end, opened=opened)
        if generate:
            return Stepped(member, position, tokens, opened=opened)
        logprobs = table.logprobs()
        order = numpy.argsort(-logprobs)[: self.candidates]
        ids, told = order.tolist(), logprobs[order].tolist()
        return Stepped(member, position, tokens, None, ids, told, opened)

    def play(self, strategy: Strategy) -> Verdict:
        waiting: list[Reply] = []
        try:
            commands = next(strategy)
            while True:
                waiting += [r for c in commands if (r := self.reply(c)) is not None]
                commands = strategy.send(waiting.pop(0))
        except StopIteration as stop:
            verdict: Verdict = stop.value
            for command in verdict.last:
                self.reply(command)
            return verdict

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.told]


def plain(count: int, length: int, weights: Sequence[float], product: bool) -> list[int]:
    """Greedy fusing in one place, over full distributions."""
    answer: list[int] = []
    for _ in range(length):
        rows = []
        for number in range(count):
            table = Table(number)
            table.answer = answer
            rows.append(table.logprobs())
        share = numpy.array(weights) / sum(weights)
        mixed = share @ (numpy.array(rows) if product else numpy.exp(rows))
        answer = [*answer, int(mixed.argmax())]
    return answer


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0, 0.5)])
def test_fuse_equals_the_plain_arithmetic(weights: tuple[float, ...], product: bool) -> None:
    members = Members(len(weights), 30, SamplingParams(temperature=0.0))
    verdict = members.play(fuse(View(weights, 2), VOCABULARY, product, 2.0))
    assert members.ids == plain(len(weights), 30, weights, product)
    assert all(len(token.votes) == len(weights) for token in members.told)
    agreed = sum(vote.agreed for token in members.told for vote in token.votes)
    assert verdict.agreement == agreed / (30 * len(weights))
    assert sum(verdict.marks[m].dissents for m in range(len(weights))) == 30 * len(weights) - agreed


def test_a_combined_distribution() -> None:
    a = Told([3, 1], [math.log(0.5), math.log(0.3)], 4, weight=3.0)
    b = Told([2, 3], [math.log(0.6), math.log(0.2)], 4, weight=1.0)
    fused = combine([a, b])
    # What a leaves (0.2) is spread over 0 and 2; what b leaves (0.2) over 0 and 1.
    expected = {3: 0.75 * 0.5 + 0.25 * 0.2, 1: 0.75 * 0.3 + 0.25 * 0.1, 2: 0.75 * 0.1 + 0.25 * 0.6}
    total = sum(expected.values())
    assert fused.ids == (3, 1, 2)
    assert fused.probabilities == pytest.approx([expected[i] / total for i in (3, 1, 2)])
    assert (a.favourite, b.favourite) == (3, 2)


def test_an_unnamed_token_is_never_above_a_named_one() -> None:
    assert Told([0], [math.log(0.1)], 3).logprob(1) == pytest.approx(math.log(0.1))


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("seed", range(200))
def test_the_likeliest_is_found_without_mixing(product: bool, seed: int) -> None:
    random = numpy.random.default_rng(seed)
    told = []
    for _ in range(random.integers(1, 5)):
        # Coarse values, so that equal ones are common; lists of several lengths.
        row = numpy.round(random.dirichlet(numpy.ones(VOCABULARY)), 1) + 0.01
        order = numpy.argsort(-row)[: random.integers(1, VOCABULARY + 1)]
        logprobs = numpy.log(row[order] / row.sum()).tolist()
        told.append(Told(order.tolist(), logprobs, VOCABULARY, random.choice([0.5, 1.0, 3.0])))
    banned = frozenset(random.choice(VOCABULARY, 3).tolist() if seed % 2 else ())
    fused = combine(told, product)
    left = [token for token in fused.ids if token not in banned]
    assert fused.likeliest(banned) == (left[0] if left else None)
    assert all(fused.value(token) == value for token, value in fused.mixed.items())


def test_members_that_agree_are_read_no_further() -> None:
    told = [Told([4, 2, 3], [math.log(p) for p in (0.6, 0.2, 0.1)], 9) for _ in range(3)]
    fused = combine(told)
    assert choose(fused, Rules(temperature=0.0), 0, {}, ()) == 4
    assert "mixed" not in vars(fused)


def test_a_token_is_chosen_even_if_all_are_banned() -> None:
    fused = combine([Told([4, 2], [math.log(0.6), math.log(0.4)], 9)])
    assert choose(fused, Rules(temperature=0.0), 0, {}, (2, 4)) == 4


def test_choosing_follows_the_rules() -> None:
    fused = combine([Told(range(4), [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)], 4)])

    def chosen(
        rules: Rules, counts: dict[int, int] | None = None, banned: Sequence[int] = ()
    ) -> Counter[int]:
        return Counter(choose(fused, rules, index, counts or {}, banned) for index in range(4000))

    free = chosen(Rules(seed=1))
    assert [free[i] / 4000 for i in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.03)
    assert set(chosen(Rules(seed=1, top_k=2))) == {0, 1}
    assert set(chosen(Rules(seed=1, top_p=0.5))) == {0, 1}
    assert set(chosen(Rules(seed=1, min_p=0.6))) == {0, 1}
    assert set(chosen(Rules(temperature=0.0))) == {0}
    assert set(chosen(Rules(temperature=0.0), banned=[0])) == {1}
    assert set(chosen(Rules(temperature=0.0, logit_bias={3: 9.0}))) == {3}
    assert set(chosen(Rules(temperature=0.0, frequency_penalty=0.2), {0: 2})) == {1}
    assert set(chosen(Rules(temperature=1e-9, seed=5))) == {0}


def test_mixture_sample_is_exact_for_the_mean() -> None:
    weights, counts, draws = (1.0, 3.0), Counter[int](), 4000
    for seed in range(draws):
        members = Members(2, 1, SamplingParams(temperature=1.0, seed=seed))
        members.play(mixture_sample(View(weights, 1, seed=seed), 2.0))
        counts[members.ids[0]] += 1
    mean = numpy.array([0.25, 0.75]) @ numpy.exp([Table(0).logprobs(), Table(1).logprobs()])
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(mean))
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_mixture_sample_gives_runs_and_catches_up() -> None:
    members = Members(3, 60, SamplingParams(temperature=1.0, seed=7))
    verdict = members.play(mixture_sample(View((1.0, 1.0, 1.0), 2, seed=7), 2.0))
    assert len(members.ids) == 60 and verdict.end.completion_tokens == 60
    assert {table.number for table in members.tables} == {t.votes[0].member for t in members.told}
    assert any(take.generate > 1 for take in members.takes)
    answers = [table.answer for table in members.tables]
    assert all(members.ids[: len(answer)] == answer for answer in answers)


def test_mixture_sample_refuses_greedy() -> None:
    members = Members(2, 5, SamplingParams(temperature=0.0))
    with pytest.raises(InvalidRequest, match="temperature"):
        members.play(mixture_sample(View((1.0, 1.0), 1), 2.0))


class TestMembersThatFail:
    """Two of three go on by the quorum rule; the third comes back."""

    def begin(self, quorum: int = 2) -> tuple[Members, Strategy, dict[int, Reply]]:
        members = Members(3, 30, SamplingParams(temperature=0.0))
        strategy = fuse(View((1.0,) * 3, quorum), VOCABULARY, False, 2.0)
        opened = {c.member: members.reply(c) for c in next(strategy) if isinstance(c, Open)}
        return members, strategy, {m: r for m, r in opened.items() if r is not None}

    def test_a_late_one_is_left_and_catches_up(self) -> None:
        members, strategy, opened = self.begin()
        assert list(strategy.send(opened[0])) == []
        assert list(strategy.send(opened[1])) == []
        commands = strategy.send(Rang("late"))
        assert [c.member for c in commands if isinstance(c, Take)] == [0, 1]
        (late,) = strategy.send(opened[2])  # its old word: it is given what it missed
        assert isinstance(late, Take) and (late.member, len(late.ids)) == (2, 1)
        # The others do not wait for it.
        replies = [r for c in commands if (r := members.reply(c)) is not None]
        strategy.send(replies[0])
        commands = strategy.send(replies[1])
        assert [c.member for c in commands if isinstance(c, Take)] == [0, 1]
        caught_up = members.reply(late)
        assert caught_up is not None
        (again,) = strategy.send(caught_up)
        assert isinstance(again, Take) and len(again.ids) == 1

    def test_a_lost_one_is_opened_again_with_the_answer_so_far(self) -> None:
        _, strategy, opened = self.begin()
        commands = strategy.send(Lost(2, ValueError("died")))
        assert any(isinstance(c, Alarm) and c.name == "rejoin" for c in commands)
        strategy.send(opened[0])
        strategy.send(opened[1])
        (again,) = strategy.send(Rang("rejoin"))
        assert isinstance(again, Open) and (again.member, len(again.made)) == (2, 1)

    def test_too_few_are_left(self) -> None:
        _, strategy, _ = self.begin()
        strategy.send(Lost(2, ValueError("died")))
        with pytest.raises(QuorumNotMet, match="1 of 3 members answered, the quorum is 2: died"):
            strategy.send(Lost(1, ValueError("died")))

    def test_another_tokenizer_is_refused(self) -> None:
        _, strategy, opened = self.begin()
        strategy.send(opened[0])
        stranger = Stepped(1, 0, opened=StepOpened(worker="w", tokenizer_fingerprint="other"))
        with pytest.raises(InvalidRequest, match="worker w has another tokenizer"):
            strategy.send(stranger)

    def test_a_turn_that_is_late_goes_to_another(self) -> None:
        strategy = mixture_sample(View((1.0, 1.0), 1, seed=3), 2.0)
        (first, _) = next(strategy)
        assert isinstance(first, Open)
        commands = strategy.send(Rang("late"))
        assert any(isinstance(c, Shut) and c.member == first.member for c in commands)
        (second,) = (c for c in commands if isinstance(c, Open))
        assert second.member == 1 - first.member
