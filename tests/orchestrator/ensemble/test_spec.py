"""What an ensemble may be, and where it sits."""

from typing import Any

import pytest
from google.protobuf import json_format

from conclave.orchestrator.ensemble.panel import seat, wish_of
from conclave.orchestrator.ensemble.spec import MemberWish, Spec, read_spec
from conclave.orchestrator.gateway.panels import shrink
from conclave.orchestrator.routing.registry import Worker, WorkerState
from conclave.orchestrator.routing.router import ANY, Selector, WorkerNotFound
from conclave.protos.ensemble_pb2 import EnsembleSpec
from conclave.protos.generation_pb2 import GenerateRequest, Prompt, SamplingParams
from conclave.worker.errors import InvalidRequest


def spec(fields: dict[str, Any], **sampling: Any) -> Spec:
    message = json_format.ParseDict(fields, EnsembleSpec())
    request = GenerateRequest(prompt=Prompt(text="q"), sampling=SamplingParams(**sampling))
    return read_spec(message, request, ANY)


def test_defaults() -> None:
    voted = spec({"vote": {}})
    assert (len(voted.members), voted.quorum, voted.hasty, voted.timeout) == (3, 2, False, None)
    assert len(spec({"hedge": {}}).members) == 2
    assert spec({"fuse": {}}).timeout == 2.0
    named = spec({"vote": {}, "members": [{"weight": 2}, {"selector": {"names": ["a"]}}]})
    assert [member.weight for member in named.members] == [2.0, 1.0]
    assert named.members[1].selector.names == {"a"}


@pytest.mark.parametrize(
    ("fields", "sampling", "field"),
    [
        ({}, {}, "ensemble.strategy"),
        ({"vote": {}, "count": 0}, {}, "ensemble.count"),
        ({"vote": {}, "count": 17}, {}, "ensemble.count"),
        ({"fuse": {}, "count": 1}, {}, "ensemble.count"),
        ({"fuse": {}, "members": [{}]}, {}, "ensemble.members"),
        ({"vote": {}, "count": 3, "members": [{}, {}]}, {}, "ensemble.count"),
        ({"vote": {}, "members": [{"weight": 0}, {}]}, {}, "ensemble.members[0].weight"),
        ({"vote": {}, "members": [{"weight": "NaN"}, {}]}, {}, "ensemble.members[0].weight"),
        ({"vote": {}, "quorum": 4}, {}, "ensemble.quorum"),
        ({"vote": {}, "quorum": 0}, {}, "ensemble.quorum"),
        ({"hedge": {}, "quorum": 1}, {}, "ensemble.quorum"),
        ({"vote": {}, "memberTimeoutSeconds": -1}, {}, "ensemble.member_timeout_seconds"),
        ({"vote": {}, "maxCost": 0}, {}, "ensemble.max_cost"),
        ({"vote": {}, "maxTotalTokens": 0}, {}, "ensemble.max_total_tokens"),
        ({"vote": {}, "width": [{"load": 0.5}]}, {}, "ensemble.width[0].members"),
        (
            {"vote": {}, "width": [{"load": 0.5, "members": 1}, {"load": 0.1, "members": 1}]},
            {},
            "ensemble.width",
        ),
        ({"vote": {"extract": "("}}, {}, "ensemble.vote.extract"),
        ({"vote": {"samples": 65}}, {}, "ensemble.vote.samples"),
        ({"bestOf": {"samples": 65}}, {}, "ensemble.best_of.samples"),
        ({"hedge": {"quantile": 1}}, {}, "ensemble.hedge.quantile"),
        ({"hedge": {"afterSeconds": -1}}, {}, "ensemble.hedge.after_seconds"),
        ({"cascade": {}}, {}, "ensemble.members"),
        ({"mixture": {"aggregator": 3}}, {}, "ensemble.mixture.aggregator"),
        ({"mixture": {"template": "{drafts}"}}, {}, "ensemble.mixture.template"),
        ({"fuse": {"candidates": 0}}, {}, "ensemble.fuse.candidates"),
        ({"vote": {}}, {"n": 2}, "sampling.n"),
        ({"vote": {}}, {"prompt_logprobs": 0}, "sampling.prompt_logprobs"),
        ({"fuse": {}}, {"repetition_penalty": 1.1}, "sampling.repetition_penalty"),
        ({"mixtureSample": {}}, {"temperature": 0.0}, "sampling.temperature"),
    ],
)
def test_what_is_wrong_is_named(
    fields: dict[str, Any], sampling: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        spec(fields, **sampling)
    assert field in [violation.field for violation in refused.value.violations]


def test_a_mixture_needs_a_prompt_that_it_can_write_into() -> None:
    message = json_format.ParseDict({"mixture": {}}, EnsembleSpec())
    request = GenerateRequest(prompt=Prompt(token_ids={"ids": [1]}))
    with pytest.raises(InvalidRequest, match="prompt"):
        read_spec(message, request, ANY)


CURVE = [{"load": 0.5, "members": 3}, {"load": 0.9, "members": 1}]


@pytest.mark.parametrize(
    ("strategy", "more", "load", "width"),
    [
        ("vote", {}, 0.0, 5),
        ("vote", {}, 0.5, 3),
        ("vote", {}, 2.0, 1),
        ("fuse", {}, 2.0, 2),
        ("vote", {"quorum": 3}, 2.0, 3),
    ],
)
def test_width_under_load(strategy: str, more: dict[str, Any], load: float, width: int) -> None:
    wide = spec({strategy: {}, "count": 5, "width": CURVE, **more})
    assert wide.width_at(load) == width
    assert len(shrink(wide, width).members) == width


def test_a_shrunk_mixture_keeps_its_writer() -> None:
    members = [{"selector": {"names": [name]}} for name in "abcd"]
    small = shrink(spec({"mixture": {"aggregator": 3}, "members": members}), 2)
    assert [set(member.selector.names) for member in small.members] == [{"a"}, {"d"}]
    assert small.message.mixture.aggregator == 1


def worker(name: str, tokens: int = 0, state: WorkerState = WorkerState.SERVING) -> Worker:
    return Worker(name, state=state, open_tokens=tokens)


def test_seats_are_different_and_least_loaded_first() -> None:
    workers = [worker("a", 50), worker("b", 5), worker("c", 1), worker("d", 0, WorkerState.DOWN)]
    seats = seat(workers, [MemberWish()] * 2)
    assert [w.name for w in seats if w] == ["c", "b"]
    assert [w and w.name for w in seat(workers, [MemberWish()] * 4)] == ["c", "b", "a", None]


def test_a_slow_worker_is_not_seated_for_being_idle() -> None:
    workers = [worker("slow"), worker("fast", 20), worker("new", 30)]
    workers[0].speed, workers[1].speed = 10.0, 100.0
    assert [w and w.name for w in seat(workers, [MemberWish()], tokens=50)] == ["fast"]
    workers[1].open_tokens = 5000
    assert [w and w.name for w in seat(workers, [MemberWish()], tokens=50)] == ["new"]


def test_whoever_is_named_keeps_its_place() -> None:
    workers = [worker("a"), worker("b", 99)]
    wishes = [MemberWish(), MemberWish(Selector(frozenset("a")))]
    seats = seat(workers, wishes)
    assert [w and w.name for w in seats] == ["b", "a"]
    wish = wish_of(0, wishes, seats)
    assert wish.pinned == "b" and wish.avoid == {"a"}


def test_a_place_for_nobody_is_told() -> None:
    with pytest.raises(WorkerNotFound):
        seat([worker("a")], [MemberWish(Selector(model="other"))])
