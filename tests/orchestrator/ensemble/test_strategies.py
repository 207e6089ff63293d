"""Strategies are generators, so a list of replies is a whole ensemble."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from conclave.orchestrator.ensemble.best_of import best_of
from conclave.orchestrator.ensemble.calls import (
    Alarm,
    Answer,
    Ask,
    Broke,
    Command,
    Disarm,
    Drop,
    Ended,
    Heard,
    Judge,
    Judged,
    QuorumNotMet,
    Rang,
    Reply,
    Say,
    Strategy,
    Verdict,
    View,
)
from conclave.orchestrator.ensemble.cascade import cascade
from conclave.orchestrator.ensemble.hedge import FOR_THE_LATEST, SHORTEST_PAUSE, hedge, single
from conclave.orchestrator.ensemble.mixture import TEMPLATE, mixture
from conclave.orchestrator.ensemble.vote import answer_of, vote
from conclave.protos.generation_pb2 import (
    Chat,
    ChatMessage,
    GenerateResponse,
    OutputEnd,
    Prompt,
    Token,
)

EVENT = GenerateResponse()


def said(text: str, logprob: float = 0.0) -> Answer:
    return Answer((Token(text=text),), OutputEnd(), logprob)


def play(strategy: Strategy, replies: Sequence[Reply]) -> tuple[list[Command], Verdict]:
    """All commands that a strategy gave, and how it ended."""
    given = list(next(strategy))
    try:
        for reply in replies:
            given += strategy.send(reply)
    except StopIteration as stop:
        return [*given, *stop.value.last], stop.value
    raise AssertionError("it wants more replies")


def asked(commands: Sequence[Command]) -> list[tuple[int, int]]:
    return [(c.call, c.member) for c in commands if isinstance(c, Ask)]


THREE = View((1.0, 1.0, 1.0), quorum=2)


class TestVote:
    def test_ends_once_the_majority_cannot_change(self) -> None:
        replies: list[Reply] = [Ended(0, said("Yes.", -2.0)), Ended(2, said("yes", -1.0))]
        commands, verdict = play(vote(THREE, 3, None, True), replies)
        assert asked(commands) == [(0, 0), (1, 1), (2, 2)]
        assert len({c.seed for c in commands if isinstance(c, Ask)}) == 3
        assert verdict.answer is not None and verdict.answer.text == "yes"  # the likelier one
        assert (verdict.winner, verdict.agreement) == (2, 1.0)

    def test_waits_while_it_can_change(self) -> None:
        strategy = vote(THREE, 3, None, True)
        next(strategy)
        strategy.send(Ended(0, said("a")))
        strategy.send(Ended(1, said("b")))
        with pytest.raises(StopIteration) as stop:
            strategy.send(Ended(2, said("b")))
        verdict = stop.value.value
        assert verdict.answer.text == "b"
        assert [verdict.marks[call].agreed for call in range(3)] == [False, True, True]
        assert verdict.agreement == pytest.approx(2 / 3)

    def test_weights_count(self) -> None:
        view = View((5.0, 1.0, 1.0), quorum=1)
        _, verdict = play(vote(view, 3, None, True), [Ended(0, said("heavy"))])
        assert verdict.answer is not None and verdict.answer.text == "heavy"

    def test_samples_go_round_and_an_extract_is_compared(self) -> None:
        texts = ["so 4", "it is 5", "thus 5.", "5 it is", "nothing"]
        replies: list[Reply] = [Ended(n, said(text)) for n, text in enumerate(texts)]
        view = View((1.0, 1.0), quorum=2)
        commands, verdict = play(vote(view, 5, r"\d+", True), replies[:4])
        assert asked(commands) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
        assert verdict.marks[1].answer == "5"

    def test_a_hasty_quorum_does_not_wait(self) -> None:
        view = View((1.0, 1.0, 1.0), quorum=2, hasty=True)
        _, verdict = play(vote(view, 3, None, True), [Ended(0, said("a")), Ended(1, said("b"))])
        assert verdict.answer is not None and verdict.answer.text == "a"

    def test_too_few(self) -> None:
        replies: list[Reply] = [
            Broke(0, ValueError("x")),
            Ended(1, said("a")),
            Broke(2, ValueError("y")),
        ]
        with pytest.raises(QuorumNotMet, match="1 of 3 members answered, the quorum is 2: x; y"):
            play(vote(THREE, 3, None, True), replies)

    @pytest.mark.parametrize(
        ("text", "extract", "found"),
        [
            ("  The  Answer! ", None, "the answer"),
            ("a=1 a=2", r"a=(\d)", "2"),
            ("none", r"\d", None),
            ("", None, ""),
        ],
    )
    def test_what_a_text_says(self, text: str, extract: str | None, found: str | None) -> None:
        assert answer_of(text, extract, True) == found

    def test_as_it_is(self) -> None:
        assert answer_of(" A.", None, False) == " A."


class TestBestOf:
    def test_by_its_own_member(self) -> None:
        replies: list[Reply] = [
            Ended(n, said(str(n), logprob)) for n, logprob in enumerate((-2.0, -1.0, -3.0))
        ]
        _, verdict = play(best_of(THREE, 3, False), replies)
        assert verdict.answer is not None and verdict.answer.text == "1"
        assert verdict.marks[2].score == -3.0

    def test_by_all_members(self) -> None:
        replies: list[Reply] = [
            Ended(0, said("a", -1.0)),
            Ended(1, said("b", -1.5)),
            Broke(2, ValueError("dead")),
        ]
        strategy = best_of(THREE, 3, True)
        next(strategy)
        for reply in replies[:2]:
            strategy.send(reply)
        judges = strategy.send(replies[2])
        assert [(c.call, c.member, c.answers[0].text) for c in judges if isinstance(c, Judge)] == [
            (3, 0, "b"),
            (4, 1, "a"),
        ]
        strategy.send(Judged(3, (-0.1,)))
        with pytest.raises(StopIteration) as stop:
            strategy.send(Judged(4, (-9.0,)))
        assert stop.value.value.answer.text == "b"
        assert stop.value.value.marks[1].score == pytest.approx(-0.8)

    def test_a_judge_that_fails_is_left_out(self) -> None:
        view = View((1.0, 1.0), quorum=2)
        replies: list[Reply] = [
            Ended(0, said("a", -1.0)),
            Ended(1, said("b", -1.5)),
            Broke(2, ValueError()),
            Judged(3, (-5.0,)),
        ]
        _, verdict = play(best_of(view, 2, True), replies)
        assert verdict.marks[0].score == -3.0 and verdict.marks[1].score == -1.5


class TestCascade:
    def test_stops_where_it_is_sure(self) -> None:
        commands, verdict = play(cascade(THREE, -1.0), [Ended(0, said("cheap", -0.5))])
        assert asked(commands) == [(0, 0)]
        assert verdict.answer is not None and verdict.answer.text == "cheap"

    def test_escalates_and_streams_the_last(self) -> None:
        replies: list[Reply] = [
            Ended(0, said("unsure", -2.0)),
            Broke(1, ValueError()),
            Heard(2, EVENT),
            Ended(2, said("big", -3.0)),
        ]
        commands, verdict = play(cascade(THREE, -1.0), replies)
        assert [c.live for c in commands if isinstance(c, Ask)] == [False, False, True]
        assert sum(isinstance(c, Say) for c in commands) == 1
        assert verdict.answer is None and verdict.winner == 2
        assert not verdict.marks[0].agreed

    def test_the_surest_if_the_strongest_fails(self) -> None:
        view = View((1.0, 1.0, 1.0), quorum=1)
        replies: list[Reply] = [
            Ended(0, said("a", -3.0)),
            Ended(1, said("b", -2.0)),
            Broke(2, ValueError()),
        ]
        _, verdict = play(cascade(view, -1.0), replies)
        assert verdict.answer is not None and verdict.answer.text == "b"

    def test_a_stream_that_breaks_is_a_failure(self) -> None:
        view = View((1.0, 1.0), quorum=1)
        replies: list[Reply] = [
            Ended(0, said("a", -3.0)),
            Heard(1, EVENT),
            Broke(1, ValueError("cut")),
        ]
        with pytest.raises(ValueError, match="cut"):
            play(cascade(view, -1.0), replies)


class TestHedge:
    VIEW = View((1.0, 1.0), quorum=1)

    def test_nobody_is_asked_twice_while_it_is_fast(self) -> None:
        replies: list[Reply] = [Heard(0, EVENT), Rang(), Ended(0, said("a"))]
        commands, _ = play(hedge(self.VIEW, 0.1), replies)
        assert asked(commands) == [(0, 0)]
        assert any(isinstance(c, Disarm) for c in commands)

    def test_the_loser_is_cancelled(self) -> None:
        replies: list[Reply] = [Rang(), Heard(1, EVENT), Heard(1, EVENT), Ended(1, said("b"))]
        commands, verdict = play(hedge(self.VIEW, 0.1), replies)
        assert asked(commands) == [(0, 0), (1, 1)]
        assert [c.call for c in commands if isinstance(c, Drop)] == [0]
        assert verdict.winner == 1

    def test_what_the_loser_had_said_is_not_heard(self) -> None:
        late = GenerateResponse(request_id="loser")
        replies: list[Reply] = [
            Rang(),
            Heard(1, EVENT),
            Heard(0, late),
            Broke(0, ValueError()),
            Ended(1, said("b")),
        ]
        commands, verdict = play(hedge(self.VIEW, 0.1), replies)
        assert [c.event for c in commands if isinstance(c, Say)] == [EVENT]
        assert verdict.winner == 1

    def test_no_budget_no_hedge(self) -> None:
        replies: list[Reply] = [Rang(granted=False), Heard(0, EVENT), Ended(0, said("a"))]
        commands, _ = play(hedge(self.VIEW, 0.1), replies)
        assert asked(commands) == [(0, 0)]

    def test_who_is_refused_tries_again_with_all_of_the_budget(self) -> None:
        replies: list[Reply] = [
            Rang(granted=False),
            Rang(),
            Heard(1, EVENT),
            Ended(1, said("b")),
        ]
        commands, verdict = play(hedge(self.VIEW, 0.1), replies)
        assert [(c.seconds, c.keep) for c in commands if isinstance(c, Alarm)] == [
            (0.1, FOR_THE_LATEST),
            (0.1, 0.0),
        ]
        assert verdict.winner == 1

    def test_alarms_have_a_shortest_pause(self) -> None:
        replies: list[Reply] = [Rang(granted=False), Heard(0, EVENT), Ended(0, said("a"))]
        commands, _ = play(hedge(self.VIEW, 0.0), replies)
        assert [c.seconds for c in commands if isinstance(c, Alarm)] == [0.0, SHORTEST_PAUSE]

    def test_a_failure_is_replaced_at_once(self) -> None:
        replies: list[Reply] = [Broke(0, ValueError()), Heard(1, EVENT), Ended(1, said("b"))]
        _, verdict = play(hedge(self.VIEW, 0.1), replies)
        assert verdict.winner == 1

    def test_who_replaces_a_failure_has_as_much_time(self) -> None:
        view = View((1.0, 1.0, 1.0), quorum=1)
        replies: list[Reply] = [Broke(0, ValueError()), Heard(1, EVENT), Ended(1, said("b"))]
        commands, _ = play(hedge(view, 0.1), replies)
        alarms = [c for c in commands if isinstance(c, Alarm | Ask)]
        assert [type(c) for c in alarms] == [Ask, Alarm, Ask, Alarm]

    def test_the_last_one_needs_no_alarm(self) -> None:
        replies: list[Reply] = [Broke(0, ValueError()), Heard(1, EVENT), Ended(1, said("b"))]
        commands, _ = play(hedge(self.VIEW, 0.1), replies)
        assert [type(c) for c in commands[:4]] == [Ask, Alarm, Ask, Disarm]

    def test_nobody_is_left(self) -> None:
        with pytest.raises(ValueError, match="second"):
            play(
                hedge(self.VIEW, 9), [Broke(0, ValueError("first")), Broke(1, ValueError("second"))]
            )

    def test_single_asks_one(self) -> None:
        commands, _ = play(single(THREE), [Heard(0, EVENT), Ended(0, said("a"))])
        assert asked(commands) == [(0, 0)] and not any(isinstance(c, Alarm) for c in commands)


class TestMixture:
    def test_drafts_stand_before_the_aggregator(self) -> None:
        replies: list[Reply] = [
            Ended(1, said(" two ")),
            Broke(0, ValueError()),
            Heard(2, EVENT),
            Ended(2, said("sum")),
        ]
        view = View((1.0, 1.0, 1.0), quorum=1)
        commands, verdict = play(mixture(view, Prompt(text="{q}?"), 2, TEMPLATE), replies)
        last = [c for c in commands if isinstance(c, Ask)][-1]
        assert last.prompt is not None and last.live
        assert (
            last.prompt.text.startswith("{q}?\n\nBelow") and "Draft 1:\ntwo\n" in last.prompt.text
        )
        assert verdict.winner == 2 and verdict.answer is None

    def test_a_proposer_that_was_not_waited_for_does_not_cut_the_answer(self) -> None:
        replies: list[Reply] = [
            Ended(0, said("draft")),
            Heard(2, EVENT),
            Ended(1, said("late")),
            Heard(2, EVENT),
            Ended(2, said("sum")),
        ]
        view = View((1.0, 1.0, 1.0), quorum=1, hasty=True)
        commands, _ = play(mixture(view, Prompt(text="q"), 2, TEMPLATE), replies)
        assert sum(isinstance(c, Say) for c in commands) == 2

    def test_the_last_turn_of_a_chat_carries_them(self) -> None:
        turns = [ChatMessage(role="system", content="s"), ChatMessage(role="user", content="q")]
        replies: list[Reply] = [Ended(1, said("d")), Ended(0, said("sum"))]
        view = View((1.0, 1.0), quorum=1)
        prompt = Prompt(chat=Chat(messages=turns))
        commands, _ = play(mixture(view, prompt, 0, "{drafts}|{prompt}"), replies)
        full = [c for c in commands if isinstance(c, Ask)][-1].prompt
        assert full is not None
        assert [turn.content for turn in full.chat.messages] == ["s", "Draft 1:\nd|q"]

    def test_without_drafts_there_is_no_answer(self) -> None:
        replies: list[Reply] = [Broke(0, ValueError("x")), Broke(1, ValueError("x"))]
        with pytest.raises(QuorumNotMet):
            play(mixture(THREE, Prompt(text="q"), 2, TEMPLATE), replies)


@pytest.mark.parametrize(
    "begin",
    [
        lambda: vote(THREE, 3, None, True),
        lambda: best_of(THREE, 3, True),
        lambda: mixture(THREE, Prompt(text="q"), 2, TEMPLATE),
    ],
)
def test_a_late_reply_of_a_dropped_call_does_no_harm(begin: Callable[[], Any]) -> None:
    strategy = begin()
    next(strategy)
    assert list(strategy.send(Rang())) == []
