"""Ensembles through a real gateway, with scripted workers: who is asked, cancelled, reported."""

import asyncio
import time
from typing import Any

import pytest

from conclave.orchestrator.client import InvalidRequest, QuorumNotMet, WorkerNotFound


def says(fleet: Any, *texts: str) -> None:
    for worker, text in zip(fleet.workers, texts, strict=True):
        worker.script = fleet.Scripts.say(text)


def test_vote(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            says(fleet, "yes", "no", "Yes. ")
            fleet.workers[0].script = fleet.Scripts.say("yes", pause=0.1)
            answer = await fleet.client.generate("q", ensemble={"vote": {}})
            assert answer.text.strip(" .").lower() == "yes"
            report = answer.ensemble
            assert (report.strategy, report.width, report.asked_width) == ("vote", 3, 3)
            assert {m.worker: m.agreed for m in report.members} == {
                "w0": True,
                "w1": False,
                "w2": True,
            }
            assert report.agreement == pytest.approx(2 / 3)
            assert report.total_tokens == 3 * (5 + 1)
            seeds = {worker.asked[0].sampling.seed for worker in fleet.workers}
            assert len(seeds) == 3

    run(scenario())


def test_vote_returns_at_its_quorum_and_cancels_the_rest(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            says(fleet, "a", "b", "c")
            fleet.workers[2].script = fleet.Scripts.hang()
            started = time.monotonic()
            answer = await fleet.client.generate("q", ensemble={"vote": {}, "quorum": 2})
            assert time.monotonic() - started < 1.0
            assert [m.state for m in answer.ensemble.members] == ["answered"] * 2 + ["cancelled"]
            await fleet.until(lambda: fleet.workers[2].cancelled == 1)
            assert all(w.open_requests == 0 for w in fleet.gateway.registry.workers.values())

    run(scenario())


def test_a_slow_member_is_left_behind(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            says(fleet, "a", "b", "c")
            fleet.workers[2].script = fleet.Scripts.hang()
            spec = {"vote": {}, "memberTimeoutSeconds": 0.2}
            answer = await fleet.client.generate("q", ensemble=spec)
            late = answer.ensemble.members[2]
            assert late.state == "left_behind" and "within 0.2 s" in late.reason

    run(scenario())


def test_a_missed_quorum_is_aborted(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            for worker in fleet.workers[1:]:
                worker.script = fleet.Scripts.fail_after(0)
            with pytest.raises(QuorumNotMet, match="1 of 3 members answered, the quorum is 2"):
                await fleet.client.generate("q", ensemble={"vote": {}})

    run(scenario())


def test_a_callers_mistake_says_more_than_a_missed_quorum(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.invalid("prompt")
            with pytest.raises(InvalidRequest, match="prompt"):
                await fleet.client.generate("q", ensemble={"vote": {}})

    run(scenario())


def test_best_of_is_judged_by_the_others(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            says(fleet, "a", "b")
            answer = await fleet.client.generate("q", ensemble={"bestOf": {}, "count": 2})
            roles = sorted(m.role for m in answer.ensemble.members)
            assert roles == ["candidate", "candidate", "score", "score"]
            assert sum(m.agreed for m in answer.ensemble.members) == 1

    run(scenario())


def test_cascade_escalates(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            says(fleet, "cheap", "big")
            members = [{"selector": {"names": ["w0"]}}, {"selector": {"names": ["w1"]}}]
            unsure = {"cascade": {"minMeanLogprob": 0.5}, "members": members}
            stream = fleet.client.stream("q", ensemble=unsure)
            assert [delta.text async for delta in stream] == ["big"]
            assert [m.agreed for m in stream.completion.ensemble.members] == [False, True]
            sure = {"cascade": {"minMeanLogprob": -0.5}, "members": members}
            assert (await fleet.client.generate("q", ensemble=sure)).text == "cheap"

    run(scenario())


def test_mixture_writes_with_the_drafts(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            says(fleet, "a draft", "the answer")
            members = [{"selector": {"names": ["w0"]}}, {"selector": {"names": ["w1"]}}]
            spec = {"mixture": {"template": "{prompt}: {drafts}"}, "members": members}
            answer = await fleet.client.generate("q", ensemble=spec)
            assert (answer.text, answer.worker) == ("the answer", "w1")
            assert fleet.workers[1].asked[0].prompt.text == "q: Draft 1:\na draft"

    run(scenario())


def test_hedge_cancels_the_loser(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            says(fleet, "slow", "fast")
            fleet.workers[0].script = fleet.Scripts.hang()
            members = [{"selector": {"names": ["w0"]}}, {"selector": {"names": ["w1"]}}]
            spec = {"hedge": {"afterSeconds": 0.05}, "members": members}
            answer = await fleet.client.generate("q", ensemble=spec)
            assert (answer.text, answer.worker) == ("fast", "w1")
            assert [m.state for m in answer.ensemble.members] == ["cancelled", "answered"]
            await fleet.until(lambda: fleet.workers[0].cancelled == 1)
            assert (await fleet.client.fleet()).hedges == 1

    run(scenario())


def test_hedges_keep_to_their_budget(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2, hedge_share=0.0) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.answer(pause=0.02)
            spec = {"hedge": {"afterSeconds": 0.0}}
            for _ in range(20):
                await fleet.client.generate("q", ensemble=spec)
            assert (await fleet.client.fleet()).hedges == 8  # half of the reserve
            for worker in fleet.workers:
                worker.script = fleet.Scripts.answer(first=0.1)
            for _ in range(20):
                await fleet.client.generate("q", ensemble=spec)
            assert (await fleet.client.fleet()).hedges == 16  # all of it: these wait for longer

    run(scenario())


def test_events_tell_of_members_as_they_end(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            says(fleet, "a", "a", "a")
            from google.protobuf import json_format

            from conclave.protos.ensemble_pb2 import EnsembleSpec

            spec = json_format.ParseDict({"vote": {}, "includeTexts": True}, EnsembleSpec())
            events = await fleet.events(ensemble=spec)
            kinds = [event.WhichOneof("event") for event in events]
            assert kinds[-2:] == ["delta", "finished"] and set(kinds[:-2]) == {"member"}
            assert {e.member.text for e in events[:-2]} == {"a"}
            assert all(event.request_id == "r" for event in events)
            assert not events[-2].delta.tokens[0].HasField("logprob")

    run(scenario())


def test_presets(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3, ensembles={"careful": {"vote": {}, "count": 3}}) as fleet:
            says(fleet, "a", "a", "a")
            answer = await fleet.client.generate("q", ensemble="careful")
            assert answer.ensemble.strategy == "vote"
            assert (await fleet.client.fleet()).presets == ("careful",)
            with pytest.raises(InvalidRequest, match="known: careful"):
                await fleet.client.generate("q", ensemble="careless")

    run(scenario())


def test_caps_leave_no_room_for_more(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            says(fleet, "a", "a", "a")
            prompt = [1] * 10
            spec = {"vote": {}, "maxTotalTokens": 27, "quorum": 1}
            answer = await fleet.client.generate(prompt, ensemble=spec, max_tokens=8)
            asked = [w.asked[0].sampling.max_tokens for w in fleet.workers if w.asked]
            assert sum(asked) + 10 * len(asked) <= 27
            assert answer.ensemble.total_tokens <= 27

    run(scenario())


def test_the_width_shrinks_under_load(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            says(fleet, "a", "a", "a")
            for worker in fleet.gateway.registry.workers.values():
                worker.max_sequences, worker.open_sequences = 4, 3
            spec = {"vote": {}, "width": [{"load": 0.7, "members": 1}]}
            answer = await fleet.client.generate("q", ensemble=spec)
            assert (answer.ensemble.width, answer.ensemble.asked_width) == (1, 3)

    run(scenario())


def test_a_member_that_dies_is_replaced_by_the_same_weights(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            for worker in fleet.gateway.registry.workers.values():
                worker.weights = "same"
            members = [{"selector": {"names": ["w0", "w2"]}}, {"selector": {"names": ["w1"]}}]
            fleet.workers[0].script = fleet.Scripts.fail_after(1)
            fleet.workers[1].script = fleet.Scripts.say("t0 t1 t2 ")
            spec = {"vote": {}, "members": members, "quorum": 2}
            answer = await fleet.client.generate("q", ensemble=spec)
            assert {m.state for m in answer.ensemble.members} == {"answered"}

    run(scenario())


def test_leaving_cancels_every_member(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.hang()
            task = asyncio.ensure_future(fleet.client.generate("q", ensemble={"vote": {}}))
            await fleet.until(lambda: all(worker.running for worker in fleet.workers))
            task.cancel()
            await fleet.until(lambda: not any(worker.running for worker in fleet.workers))
            assert all(w.open_sequences == 0 for w in fleet.gateway.registry.workers.values())

    run(scenario())


def test_a_place_for_nobody(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            members = [{"selector": {"model": "none"}}, {}]
            with pytest.raises(WorkerNotFound):
                await fleet.client.generate("q", ensemble={"vote": {}, "members": members})

    run(scenario())


def test_judging_counts_in_the_caps(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            says(fleet, "a", "b")
            spec = {"bestOf": {}, "count": 2, "maxTotalTokens": 30}
            options: dict[str, Any] = {"ensemble": spec, "max_tokens": 2}
            # Two candidates take 2 * 12 and give back half; the judges need 12 each of those 18.
            answer = await fleet.client.generate([1] * 10, **options)
            judges = [m for m in answer.ensemble.members if m.role == "score"]
            assert sorted(m.state for m in judges) == ["answered", "failed"]
            assert "cap on tokens" in "".join(m.reason for m in judges)

    run(scenario())


def test_judges_with_another_tokenizer_read_the_text(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            says(fleet, "a", "b")
            await fleet.client.generate("q", ensemble={"bestOf": {}, "count": 2})
            fleet.gateway.registry.workers["w1"].tokenizer = "another"
            await fleet.client.generate("q", ensemble={"bestOf": {}, "count": 2})
            (one, other) = fleet.workers[0].scored
            assert one.continuations[0].WhichOneof("input") == "token_ids"
            assert other.continuations[0].text == "b"

    run(scenario())
