"""`WorkerService.Step` and the heartbeat as any client meets them."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conclave.protos import generation_pb2 as pb
from conclave.protos import worker_pb2

IDS = pb.Prompt(token_ids=pb.TokenIds(ids=[20, 21, 22]))


def request(made: list[pb.Made] | None = None, **sampling: Any) -> pb.GenerateRequest:
    sampling = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(prompt=IDS, sampling=pb.SamplingParams(**sampling), made=made or [])


class Steps:
    """A call of Step that a test feeds and reads."""

    def __init__(self, stub: Any, timeout: float = 60) -> None:
        self._out: queue.Queue[worker_pb2.StepRequest | None] = queue.Queue()
        self.call = stub.Step(iter(self._out.get, None), timeout=timeout)

    def send(self, **action: Any) -> None:
        self._out.put(worker_pb2.StepRequest(**action))

    def open(self, candidates: int = 1, generate: int = 0, **fields: Any) -> Any:
        self.send(
            open=worker_pb2.StepOpen(
                request=request(**fields), candidates=candidates, generate=generate
            )
        )
        return next(self.call)

    def take(self, *ids: int, generate: int = 0) -> Any:
        self.send(take=worker_pb2.StepTake(ids=ids, generate=generate))
        return next(self.call)

    def close(self) -> None:
        self._out.put(None)

    def error(self) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            next(self.call)
        return caught.value


@pytest.fixture
def steps(worker: Any) -> Iterator[Steps]:
    steps = Steps(worker.stub)
    yield steps
    steps.call.cancel()
    steps.close()
    assert idle(worker)


def idle(worker: Any) -> bool:
    engine, deadline = worker.server.engine, time.monotonic() + 5
    while time.monotonic() < deadline:
        if not engine._open and not any(pool.used for pool in engine.load.pools):
            return True
        time.sleep(0.01)
    return False


def fields(error: Any) -> list[str]:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(error)
    bad = error_details_pb2.BadRequest()
    assert status is not None and status.details[0].Unpack(bad)
    return [violation.field for violation in bad.field_violations]


def test_greedy_steps_are_a_greedy_answer(worker: Any, steps: Steps) -> None:
    whole = worker.stub.Complete(request(max_tokens=12))
    step = steps.open(max_tokens=12, candidates=3)
    assert list(step.opened.prompt_ids) == [20, 21, 22] and step.opened.vocab_size == 512
    assert step.opened.worker == "alice" and step.opened.model == "checkpoint"
    assert len(step.opened.tokenizer_fingerprint) == 64
    assert step.opened.sampling.top_k == 40 and step.opened.sampling.HasField("seed")
    assert step.opened.sampling.top_p == 1 and step.opened.sampling.n == 1
    tokens = []
    while not step.HasField("end"):
        assert len(step.ids) == len(step.logprobs) == 3
        step = steps.take(step.ids[0])
        tokens.extend(step.tokens)
        assert step.position == len(tokens) and not step.HasField("opened")
    assert tokens == list(whole.outputs[0].tokens)
    end = whole.outputs[0].end
    assert step.end == end and not step.ids
    steps.close()
    assert list(steps.call) == [] and steps.call.code() is grpc.StatusCode.OK


def test_worker_generates_between_takes(worker: Any, steps: Steps) -> None:
    sampling: dict[str, Any] = {"max_tokens": 12, "temperature": 1.3, "seed": 5}
    ids = [t.id for t in worker.stub.Complete(request(**sampling)).outputs[0].tokens]
    got = [t.id for t in steps.open(generate=2, **sampling).tokens]
    got += [t.id for t in steps.take(*ids[2:5], generate=3).tokens]
    got += [t.id for t in steps.take(generate=50).tokens]
    assert got == ids


def test_ending_the_call_frees_the_sequence(worker: Any, steps: Steps) -> None:
    steps.open()
    load = worker.stub.GetLoad(worker_pb2.GetLoadRequest())
    assert load.running_sequences == 1
    steps.close()
    assert list(steps.call) == [] and idle(worker)


def test_cancel_and_deadline_free_the_sequence(worker: Any) -> None:
    cancelled = Steps(worker.stub)
    cancelled.open()
    cancelled.call.cancel()
    assert idle(worker)
    late = Steps(worker.stub, timeout=0.3)
    late.open()
    assert late.error().code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert idle(worker)
    cancelled.close()
    late.close()


@pytest.mark.parametrize(
    ("actions", "field"),
    [
        (["take"], "take"),
        (["nothing"], "open"),
        (["open", "open"], "open"),
        (["open", "nothing"], "take"),
        (["open", "wild take"], "take.ids"),
        (["open", "long take"], "take.ids"),
        (["open", "last take", "take"], "take"),
        (["two answers"], "sampling.n"),
        (["many candidates"], "open.candidates"),
        (["wild made"], "made[0].ids"),
        (["no prompt"], "prompt"),
    ],
)
def test_errors_name_their_field(worker: Any, steps: Steps, actions: list[str], field: str) -> None:
    step_open = worker_pb2.StepOpen
    wild = [pb.Made(ids=[600])]
    messages: dict[str, dict[str, Any]] = {
        "nothing": {},
        "open": {"open": step_open(request=request(max_tokens=2))},
        "take": {"take": worker_pb2.StepTake(ids=[20])},
        "wild take": {"take": worker_pb2.StepTake(ids=[512])},
        "last take": {"take": worker_pb2.StepTake(ids=[20, 20])},
        "long take": {"take": worker_pb2.StepTake(ids=[20, 20, 20])},
        "two answers": {"open": step_open(request=request(n=2))},
        "many candidates": {"open": step_open(request=request(), candidates=513)},
        "wild made": {"open": step_open(request=request(made=wild))},
        "no prompt": {"open": step_open(request=pb.GenerateRequest())},
    }
    for action in actions[:-1]:
        steps.send(**messages[action])
        next(steps.call)
    steps.send(**messages[actions[-1]])
    assert fields(steps.error()) == [field]


def test_takes_may_be_sent_ahead(steps: Steps) -> None:
    steps.open(max_tokens=20)
    for token in range(30, 40):
        steps.send(take=worker_pb2.StepTake(ids=[token]))
    responses = [next(steps.call) for _ in range(10)]
    assert [r.position for r in responses] == list(range(1, 11))
    assert [r.tokens[0].id for r in responses] == list(range(30, 40))


def test_drain_counts_steps_as_open_asks(own_worker: Any) -> None:
    steps = Steps(own_worker.stub)
    steps.open(max_tokens=2)
    drained = own_worker.stub.Drain.future(worker_pb2.DrainRequest())
    refused = Steps(own_worker.stub)
    refused.send(open=worker_pb2.StepOpen(request=request()))
    time.sleep(0.2)
    assert not drained.done()
    assert refused.error().code() is grpc.StatusCode.UNAVAILABLE
    steps.take(30)
    assert steps.take(31).HasField("end")
    assert drained.result(5).completed == 1
    for each in (steps, refused):
        each.close()


def test_drain_with_grace_ends_steps_that_wait(own_worker: Any) -> None:
    steps = Steps(own_worker.stub)
    steps.open()
    assert own_worker.stub.Drain(worker_pb2.DrainRequest(grace_seconds=0.1)).aborted == 1
    assert steps.error().code() is grpc.StatusCode.UNAVAILABLE
    steps.close()
    assert idle(own_worker)


def test_death_of_the_engine_ends_steps_at_once(own_worker: Any) -> None:
    steps = Steps(own_worker.stub)
    steps.open()
    own_worker.server.engine.close()
    assert steps.error().code() is grpc.StatusCode.UNAVAILABLE
    steps.close()


def test_begun_answers_are_resumed(worker: Any) -> None:
    asked: dict[str, Any] = {"max_tokens": 10, "temperature": 1.0, "seed": 2, "n": 2}
    whole = worker.stub.Complete(request(**asked))
    ids = [[token.id for token in output.tokens] for output in whole.outputs]
    made = [pb.Made(ids=ids[0][:4]), pb.Made(ids=ids[1], ended=True)]
    resumed = worker.stub.Complete(request(made=made, **asked))
    (only,) = resumed.outputs
    assert list(only.tokens) == list(whole.outputs[0].tokens)[4:]
    assert only.end == whole.outputs[0].end
    assert resumed.usage.completion_tokens == whole.usage.completion_tokens
    events = list(worker.stub.Generate(request(made=made, **asked)))
    assert [t.id for e in events for t in e.delta.tokens] == ids[0][4:]
    full = [pb.Made(ids=each) for each in ids]
    (event,) = worker.stub.Generate(request(made=full, **asked))
    assert [end.completion_tokens for end in event.finished.outputs] == [10, 10]
    with pytest.raises(grpc.RpcError) as caught:
        worker.stub.Complete(request(made=[pb.Made(), pb.Made(ids=[512])], n=2))
    assert fields(caught.value) == ["made[1].ids"]


def test_score_tells_its_usage(worker: Any) -> None:
    ask = pb.ScoreRequest(
        context=pb.Prompt(token_ids=pb.TokenIds(ids=range(30, 50))),
        continuations=[
            pb.Continuation(token_ids=pb.TokenIds(ids=[60, 61])),
            pb.Continuation(token_ids=pb.TokenIds(ids=[62, 63, 64])),
        ],
    )
    usage = worker.stub.Score(ask).usage
    assert usage.prompt_tokens == 22 + 23 and usage.completion_tokens == 0
    assert 0 < usage.cached_tokens < 40


def test_heartbeat_goes_on_while_the_engine_hangs(own_worker: Any, monkeypatch: Any) -> None:
    runner = own_worker.server.engine.model.runner
    forward, go_on = runner.forward, threading.Event()
    watch = own_worker.stub.WatchLoad(worker_pb2.WatchLoadRequest(interval_seconds=0.05))
    assert next(watch).step_age_seconds == 0

    def hang(chunks: Any) -> Any:
        assert go_on.wait(30)
        return forward(chunks)

    monkeypatch.setattr(runner, "forward", hang)
    answer = own_worker.stub.Complete.future(request(max_tokens=3))
    ages = [next(watch).step_age_seconds for _ in range(12)]
    assert ages == sorted(ages) and ages[-1] > 0.25
    go_on.set()
    answer.result(10)
    time.sleep(0.1)
    assert own_worker.stub.GetLoad(worker_pb2.GetLoadRequest()).step_age_seconds == 0
    watch.cancel()


@pytest.mark.parametrize("seconds", [0.01, -1.0, float("nan"), float("inf")])
def test_heartbeat_refuses_a_pace(worker: Any, seconds: float) -> None:
    ask = worker_pb2.WatchLoadRequest(interval_seconds=seconds)
    with pytest.raises(grpc.RpcError) as caught:
        next(worker.stub.WatchLoad(ask))
    assert fields(caught.value) == ["interval_seconds"]
