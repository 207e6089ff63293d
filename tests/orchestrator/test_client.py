"""The client's messages and values, and the blocking client against a live gateway."""

import gc
from typing import Any

import grpc
import pytest

from conclave.orchestrator.client import (
    Cancelled,
    Candidate,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    Message,
    RemoteError,
    Select,
    Token,
    Unavailable,
    WorkerNotFound,
    WorkerState,
)
from conclave.orchestrator.client.answers import Collector
from conclave.orchestrator.client.requests import generate_request, sampling_message
from conclave.orchestrator.status import Failure, error_of_event, error_of_status
from conclave.protos import generation_pb2 as pb
from conclave.worker import Knobs
from conclave.worker.errors import ConclaveError, Overloaded, Violation


def test_only_given_fields_are_sent() -> None:
    sampling = sampling_message({"temperature": 0.0, "n": 2, "stop": ["x"], "timeout": 3.0})
    assert {field.name for field, _ in sampling.ListFields()} == {"temperature", "n", "stop"}
    assert sampling_message({"logit_bias": {3: 1.5}}).logit_bias[3] == 1.5


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temprature": 1.0}, "sampling.temprature"),
        ({"top_k": "many"}, "sampling.top_k"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"stop": 3}, "sampling.stop"),
        ({"thinking": True}, "prompt"),
        ({"knobs": {"weight_bits": 3}}, "knobs.weight_bits"),
        ({"knobs": {"prefetch": True}}, "knobs.prefetch"),
        ({"knobs": Knobs(memory_budget=1)}, "knobs.memory_budget"),
        ({"messages": [Message("user", "hi")]}, "prompt"),
    ],
)
def test_what_cannot_be_asked_names_its_field(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request("hello", options)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_knobs_are_sent_as_given() -> None:
    assert not generate_request("hello", {}).HasField("knobs")
    sent = generate_request("hello", {"knobs": {"sparsity": 0}}).knobs
    assert sent.HasField("sparsity") and not sent.HasField("weight_bits")
    assert generate_request("hello", {"knobs": Knobs(weight_bits=8)}).knobs.weight_bits == 8


def test_prompts_in_three_forms() -> None:
    assert generate_request("hello", {}).prompt.text == "hello"
    assert list(generate_request([1, 2], {}).prompt.token_ids.ids) == [1, 2]
    turns = [Message("system", "be brief"), Message("user", "hi")]
    chat = generate_request(None, {"messages": turns, "thinking": True}).prompt.chat
    assert [turn.role for turn in chat.messages] == ["system", "user"]
    assert chat.thinking and chat.add_generation_prompt


def test_collector_joins_outputs_by_index() -> None:
    collector = Collector()
    for index, text in ((0, "a"), (1, "x"), (0, "b")):
        candidates = [pb.Candidate(id=7, text="c", logprob=-2.0)]
        token = pb.Token(id=1, text=text, logprob=-0.5, rank=1, candidates=candidates)
        collector.take(pb.GenerateResponse(delta=pb.Delta(output_index=index, tokens=[token])))
    ends = [
        pb.OutputEnd(output_index=0, reason=pb.FINISH_REASON_STOP, stop_text="."),
        pb.OutputEnd(output_index=1, reason=pb.FINISH_REASON_LENGTH),
    ]
    collector.take(pb.GenerateResponse(finished=pb.Finished(outputs=ends, worker="w")))
    whole = collector.completion
    assert whole is not None and [output.text for output in whole.outputs] == ["ab", "x"]
    assert whole.outputs[0].finish_reason == "stop" and whole.outputs[0].matched == "."
    assert whole.outputs[1].finish_reason == "length" and whole.outputs[1].matched is None
    assert whole.tokens[0] == Token(1, "a", -0.5, 1, (Candidate(7, "c", -2.0),))


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest([Violation("a", "is bad"), Violation("b", "too")]),
        WorkerNotFound("nobody"),
        Overloaded("full", 2.5),
        Unavailable("dead"),
        DeadlineExceeded("late"),
    ],
)
def test_errors_survive_the_wire(error: ConclaveError) -> None:
    failure = Failure.of_error(error)
    back = error_of_status(failure.code, failure.message, failure.details)
    assert type(back) is type(error) and str(back) == str(error)
    assert vars(back) == vars(error)


def test_errors_without_a_class_keep_their_code() -> None:
    error = error_of_event(pb.Error(code=13, message="broken"))
    assert isinstance(error, RemoteError) and error.code == "INTERNAL"
    full = error_of_event(pb.Error(code=8, message="full", retry_after_seconds=4.0))
    assert isinstance(full, Overloaded) and full.retry_after == 4.0
    vague = error_of_event(pb.Error(code=8, message="full"))
    assert isinstance(vague, RemoteError) and vague.code == "RESOURCE_EXHAUSTED"
    large = error_of_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max", None)
    assert isinstance(large, RemoteError) and large.code == "RESOURCE_EXHAUSTED"


def test_answers_and_streams(live: Any) -> None:
    with Client(live.address) as client:
        whole = client.generate("hello", request_id="mine")
        assert (whole.text, whole.finish_reason, whole.request_id) == (
            "t0 t1 t2 ",
            "length",
            "mine",
        )
        assert whole.usage.completion_tokens == 3 and whole.timings.total == 0.5
        stream = client.stream("hello")
        with pytest.raises(RuntimeError, match="to its end"):
            _ = stream.completion
        assert [delta.text for delta in stream] == ["t0 ", "t1 ", "t2 "]
        assert stream.completion.text == whole.text


def test_leaving_a_loop_cancels_the_stream(live: Any, scripts: Any) -> None:
    live.script(scripts.answer(10_000, pause=0.01))
    with Client(live.address) as client:
        for delta in client.stream("hello"):
            assert delta.text == "t0 "
            break
        gc.collect()
        live.until(lambda: sum(worker.cancelled for worker in live.rig.workers) == 1)
        with client.stream("hello") as stream:
            next(stream)
        with pytest.raises(Cancelled):
            list(stream)


def test_blocking_errors(live: Any, scripts: Any) -> None:
    with Client(live.address) as client:
        with pytest.raises(WorkerNotFound):
            client.generate("hello", select=Select(names=["nobody"]))
        live.script(scripts.invalid("prompt"))
        with pytest.raises(InvalidRequest, match="prompt: is bad"):
            client.generate("hello")
        live.script(scripts.fail_after(1))
        stream = client.stream("hello")
        next(stream)
        with pytest.raises(Unavailable, match="scripted"):
            next(stream)
        live.script(scripts.hang())
        with pytest.raises(DeadlineExceeded):
            client.generate("hello", timeout=0.2)
        with pytest.raises(DeadlineExceeded):
            list(client.stream("hello", timeout=0.2))


def test_workers_fleet_and_score(live: Any) -> None:
    with Client(live.address) as client:
        assert [worker.state for worker in client.workers()] == [WorkerState.SERVING] * 2
        assert client.fleet().serving_workers == 2
        assert [s.logprob for s in client.score(None, ["a", "b"])] == [-1.0, -2.0]


def test_no_gateway() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1, or none is there"):
            client.fleet()
