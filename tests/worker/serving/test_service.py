"""The worker's gRPC door as any client meets it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from conclave.protos import generation_pb2 as pb
from conclave.protos import worker_pb2
from conclave.protos.worker_pb2_grpc import WorkerServiceStub
from conclave.worker import EngineConfig, Knobs, WorkerConfig
from conclave.worker.serving.server import WorkerServer

IDS = pb.Prompt(token_ids=pb.TokenIds(ids=[20, 21, 22]))
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def ask(prompt: pb.Prompt = IDS, *, whole: bool = False, **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingParams(**sampling), whole=whole)


def endless() -> pb.GenerateRequest:
    """An answer that fills the whole context."""
    return ask(ignore_eos=True, temperature=0.0)


def until(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def violations(error: Any) -> list[str]:
    """Field names in the BadRequest detail of a status."""
    status = rpc_status.from_call(error)
    assert status is not None
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    return [violation.field for violation in bad.field_violations]


def test_stream_has_one_terminal_event_and_deltas_only(worker: Any) -> None:
    events = list(worker.stub.Generate(ask(max_tokens=6, temperature=0.0, ignore_eos=True)))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["delta"] * 6 + ["finished"]
    assert len({event.request_id for event in events}) == 1 and events[0].request_id
    finished = events[-1].finished
    assert finished.worker == "alice" and finished.model == "checkpoint"
    assert finished.usage.prompt_tokens == 3 and finished.usage.completion_tokens == 6
    assert finished.outputs[0].reason == pb.FINISH_REASON_LENGTH
    assert 0 <= finished.timings.queued <= finished.timings.first_token <= finished.timings.total


def test_whole_answer_is_one_delta_with_the_same_tokens(worker: Any) -> None:
    fields: dict[str, Any] = {"max_tokens": 9, "temperature": 0.0, "ignore_eos": True}
    streamed = [t for e in worker.stub.Generate(ask(**fields)) for t in e.delta.tokens]
    delta, finished = worker.stub.Generate(ask(whole=True, **fields))
    assert list(delta.delta.tokens) == streamed
    assert finished.WhichOneof("event") == "finished"


def test_complete_says_the_same_in_one_message(worker: Any) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 9,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": 1,
    }
    streamed = [t for e in worker.stub.Generate(ask(**fields)) for t in e.delta.tokens]
    answer = worker.stub.Complete(ask(n=2, prompt_logprobs=0, **fields))
    said = [[(t.id, t.text) for t in output.tokens] for output in answer.outputs]
    assert said == [[(t.id, t.text) for t in streamed]] * 2
    assert answer.outputs[1].text == "".join(token.text for token in streamed)
    assert [output.end.output_index for output in answer.outputs] == [0, 1]
    assert [token.id for token in answer.prompt_tokens] == [20, 21, 22]
    assert answer.usage.completion_tokens == 18 and answer.worker == "alice"


def test_complete_refuses_with_the_field(worker: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        worker.stub.Complete(ask(top_p=3))
    assert violations(caught.value) == ["sampling.top_p"]


def test_n_outputs_are_told_apart(worker: Any) -> None:
    events = list(worker.stub.Generate(ask(n=3, max_tokens=4, temperature=2.0, ignore_eos=True)))
    assert [e.WhichOneof("event") for e in events].count("finished") == 1
    lengths = [0, 0, 0]
    for event in events:
        lengths[event.delta.output_index] += len(event.delta.tokens)
    assert lengths == [4, 4, 4]
    assert [end.output_index for end in events[-1].finished.outputs] == [0, 1, 2]


def test_logprobs_and_prompt_logprobs(worker: Any) -> None:
    events = list(worker.stub.Generate(ask(max_tokens=2, logprobs=2, prompt_logprobs=1)))
    prompt = events[0].delta.prompt_tokens
    assert [token.id for token in prompt] == [20, 21, 22]
    assert not prompt[0].HasField("logprob") and prompt[1].HasField("logprob")
    assert len(prompt[1].candidates) == 1 and len(events[0].delta.tokens[0].candidates) == 2
    assert not any(event.delta.prompt_tokens for event in events[1:])


def test_text_chat_and_ids_agree(worker: Any) -> None:
    chat = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]))
    rendered = "<|turn>user\nHi<turn|>\n<|turn>model\n"
    by_chat = list(worker.stub.Generate(ask(chat, max_tokens=4, temperature=0.0, ignore_eos=True)))
    by_text = list(
        worker.stub.Generate(
            ask(pb.Prompt(text=rendered), max_tokens=4, temperature=0.0, ignore_eos=True)
        )
    )
    assert [e.delta for e in by_chat] == [e.delta for e in by_text]


def test_describe_and_load(worker: Any) -> None:
    about = worker.stub.Describe(worker_pb2.DescribeRequest())
    assert about.worker == "alice" and about.labels == {"tier": "test"}
    assert about.vocab_size == 512 and about.max_context == 200 and about.has_chat_template
    assert len(about.model_fingerprint) == len(about.tokenizer_fingerprint) == 64
    assert about.precision == pb.Precision(sparsity=0, weight_bits=32, bits_per_weight=32)
    call = worker.stub.Generate(endless())
    next(call)
    load = worker.stub.GetLoad(worker_pb2.GetLoadRequest())
    assert load.running_sequences == 1 and load.outstanding_tokens > 0
    assert load.pools[0].used > 0 and [pool.window for pool in load.pools] == [0, 8]
    call.cancel()


def test_load_tells_what_lies_on_the_host(text_checkpoint: Path) -> None:
    engine = EngineConfig(
        model=text_checkpoint, max_context=64, kv_tokens=64, block_size=4, kv_host_gib=0.01
    )
    server = WorkerServer(WorkerConfig(name="small", engine=engine))
    try:
        for start in (5, 40, 5):
            prompt = [start + number for number in range(30)]
            server.engine.generate(prompt, max_tokens=8, ignore_eos=True)
        stub = WorkerServiceStub(grpc.insecure_channel(server.address))
        pools = stub.GetLoad(worker_pb2.GetLoadRequest()).pools
        assert pools[0].host.blocks > pools[0].host.used > 0
        assert pools[0].host.spilled > 0 and pools[0].host.restored > 0
    finally:
        server.stop()


def test_weights_that_are_less_than_asked_refuse(text_checkpoint: Path) -> None:
    engine = EngineConfig(
        model=text_checkpoint,
        knobs=Knobs(sparsity=0.5),
        max_context=200,
        kv_tokens=4096,
        block_size=4,
        threads=1,
    )
    server = WorkerServer(WorkerConfig(name="sparse", engine=engine))
    asked = ask(max_tokens=2, n=99)
    asked.knobs.CopyFrom(pb.Knobs(sparsity=0.25, weight_bits=4))
    fits = ask(max_tokens=2)
    fits.knobs.CopyFrom(pb.Knobs(sparsity=0.5, weight_bits=16))
    unknown = ask(max_tokens=2)
    unknown.knobs.weight_bits = 5
    with grpc.insecure_channel(server.address) as channel:
        stub = WorkerServiceStub(channel)
        about = stub.Describe(worker_pb2.DescribeRequest())
        assert about.precision == pb.Precision(sparsity=0.5, weight_bits=16, bits_per_weight=32)
        assert about.model_fingerprint.endswith(" 8:16-bf16")
        calls: list[Callable[[pb.GenerateRequest], object]] = [
            stub.Complete,
            lambda request: list(stub.Generate(request)),
            lambda request: list(
                stub.Step(iter([worker_pb2.StepRequest(open=worker_pb2.StepOpen(request=request))]))
            ),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call(unknown)
            assert violations(caught.value) == ["knobs.weight_bits"]
            with pytest.raises(grpc.RpcError) as caught:
                call(asked)
            assert "knobs.sparsity" in violations(caught.value)
        assert {"knobs.sparsity", "sampling.n"} == set(violations(caught.value))
        assert stub.Complete(fits).usage.completion_tokens
    server.stop()


def test_score(worker: Any) -> None:
    request = pb.ScoreRequest(
        context=IDS,
        continuations=[
            pb.Continuation(token_ids=pb.TokenIds(ids=[30, 31])),
            pb.Continuation(text="abc"),
        ],
        logprobs=1,
    )
    answer = worker.stub.Score(request)
    assert [score.scored_tokens for score in answer.scores] == [2, 3]
    for score in answer.scores:
        assert score.logprob == pytest.approx(sum(t.logprob for t in score.tokens), abs=1e-4)
        assert all(len(token.candidates) == 1 for token in score.tokens)


def test_reflection_lists_the_services(worker: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(worker.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"conclave.v1.WorkerService", "grpc.health.v1.Health"} <= names


def test_cancel_frees_the_blocks_within_a_step(worker: Any) -> None:
    call = worker.stub.Generate(endless())
    next(call)
    call.cancel()
    engine = worker.server.engine
    assert until(lambda: engine.load.running == 0)
    assert all(pool.used == 0 for pool in engine.load.pools)
    assert engine.load.completion_tokens < 150 * 10


def test_deadline(worker: Any) -> None:
    # Whoever sees it first says so: the call's status, or the engine as the terminal event.
    try:
        *_, last = worker.stub.Generate(endless(), timeout=0.01)
        assert last.failed.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert until(lambda: worker.server.engine.load.running == 0)


BAD: dict[str, tuple[pb.GenerateRequest, str]] = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "no ids": (ask(pb.Prompt(token_ids=pb.TokenIds())), "prompt"),
    "id beyond the vocabulary": (
        ask(pb.Prompt(token_ids=pb.TokenIds(ids=[512]))),
        "prompt.token_ids.ids",
    ),
    "too long": (ask(pb.Prompt(text="x" * 200)), "prompt"),
    "no messages": (ask(pb.Prompt(chat=pb.Chat())), "prompt.chat.messages"),
    "unknown role": (
        ask(pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="boss", content="Hi")]))),
        "prompt.chat.messages[0].role",
    ),
    "refused by the template": (
        ask(pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="tool", content="4")]))),
        "prompt.chat.messages",
    ),
    "broken tool": (
        ask(
            pb.Prompt(
                chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")], tools_json=["{"])
            )
        ),
        "prompt.chat.tools_json[0]",
    ),
    "tool is no object": (
        ask(
            pb.Prompt(
                chat=pb.Chat(
                    messages=[pb.ChatMessage(role="user", content="Hi")], tools_json=["[]"]
                )
            )
        ),
        "prompt.chat.tools_json[0]",
    ),
    "broken tool calls": (
        ask(pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="model", tool_calls_json="{}")]))),
        "prompt.chat.messages[0].tool_calls_json",
    ),
    "negative temperature": (ask(temperature=-1), "sampling.temperature"),
    "temperature not a number": (ask(temperature=float("nan")), "sampling.temperature"),
    "infinite temperature": (ask(temperature=float("inf")), "sampling.temperature"),
    "top_p zero": (ask(top_p=0), "sampling.top_p"),
    "top_p over one": (ask(top_p=1.5), "sampling.top_p"),
    "min_p": (ask(min_p=2), "sampling.min_p"),
    "presence_penalty": (ask(presence_penalty=9), "sampling.presence_penalty"),
    "frequency_penalty": (ask(frequency_penalty=-9), "sampling.frequency_penalty"),
    "repetition_penalty": (ask(repetition_penalty=0), "sampling.repetition_penalty"),
    "n zero": (ask(n=0), "sampling.n"),
    "n too large": (ask(n=4_000_000_000), "sampling.n"),
    "max_tokens too large": (ask(max_tokens=500), "sampling.max_tokens"),
    "min over max": (ask(max_tokens=2, min_tokens=3), "sampling.min_tokens"),
    "empty stop": (ask(stop=[""]), "sampling.stop"),
    "too many stops": (ask(stop=list("abcdefghijklmnopqrstuvwxyz")), "sampling.stop"),
    "stop id": (ask(stop_token_ids=[99999]), "sampling.stop_token_ids"),
    "bias id": (ask(logit_bias={99999: 1.0}), "sampling.logit_bias"),
    "bias value": (ask(logit_bias={5: 1e9}), "sampling.logit_bias"),
    "logprobs": (ask(logprobs=1000), "sampling.logprobs"),
    "prompt_logprobs": (ask(prompt_logprobs=1000), "sampling.prompt_logprobs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_names_its_field(worker: Any, case: str) -> None:
    request, field = BAD[case]
    with pytest.raises(grpc.RpcError) as caught:
        list(worker.stub.Generate(request))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(caught.value)[0] == field
    assert field in (caught.value.details() or "")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ScoreRequest(context=IDS), "continuations"),
        (pb.ScoreRequest(context=IDS, continuations=[pb.Continuation()]), "continuations[0]"),
        (
            pb.ScoreRequest(context=pb.Prompt(), continuations=[pb.Continuation(text="a")]),
            "context",
        ),
        (
            pb.ScoreRequest(continuations=[pb.Continuation(token_ids=pb.TokenIds(ids=[3]))]),
            "continuations",
        ),
        (
            pb.ScoreRequest(context=IDS, continuations=[pb.Continuation(text="a" * 300)]),
            "continuations",
        ),
    ],
)
def test_bad_score_names_its_field(worker: Any, request_: pb.ScoreRequest, field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        worker.stub.Score(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(caught.value)[0] == field


def test_many_streams_at_once(worker: Any) -> None:
    expected = [
        [t.id for e in worker.stub.Generate(numbered(i)) for t in e.delta.tokens] for i in range(16)
    ]
    results: dict[int, list[int]] = {}

    def run(index: int) -> None:
        events = worker.stub.Generate(numbered(index))
        results[index] = [token.id for event in events for token in event.delta.tokens]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(16)] == expected


def numbered(index: int) -> pb.GenerateRequest:
    prompt = pb.Prompt(token_ids=pb.TokenIds(ids=[20 + index, 21, 22]))
    return ask(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)


def test_cancel_storm_leaks_nothing(worker: Any) -> None:
    for _ in range(5):
        calls = [worker.stub.Generate(endless()) for _ in range(20)]
        for call in calls[::2]:
            next(call)
        for call in calls:
            call.cancel()
    engine = worker.server.engine
    assert until(lambda: not engine._open and engine.load.running == engine.load.waiting == 0)
    assert until(lambda: all(pool.used == 0 for pool in engine.load.pools))


def test_drain_flips_a_watch_and_lets_running_streams_end(own_worker: Any) -> None:
    health = health_pb2_grpc.HealthStub(own_worker.channel)
    watches = [
        health.Watch(health_pb2.HealthCheckRequest(service=name))
        for name in ("", "conclave.v1.WorkerService")
    ]
    assert [next(watch).status for watch in watches] == [SERVING, SERVING]
    running = own_worker.stub.Generate(ask(max_tokens=60, ignore_eos=True))
    next(running)
    drained = own_worker.stub.Drain.future(worker_pb2.DrainRequest())
    assert [next(watch).status for watch in watches] == [NOT_SERVING, NOT_SERVING]
    with pytest.raises(grpc.RpcError) as caught:
        list(own_worker.stub.Generate(ask(max_tokens=1)))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert [e.WhichOneof("event") for e in running][-1] == "finished"
    assert drained.result().completed == 1 and drained.result().aborted == 0
    assert own_worker.stub.GetLoad(worker_pb2.GetLoadRequest()).draining


def test_drain_with_grace_ends_what_is_left_with_one_event(own_worker: Any) -> None:
    running = own_worker.stub.Generate(endless())
    next(running)
    answer = own_worker.stub.Drain(worker_pb2.DrainRequest(grace_seconds=0.0))
    assert answer.aborted == 1
    *_, last = running
    assert last.failed.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert last.failed.error.retryable


def test_dead_engine_is_seen_by_the_watch(own_worker: Any) -> None:
    health = health_pb2_grpc.HealthStub(own_worker.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == SERVING
    own_worker.server.engine.close()
    assert next(watch).status == NOT_SERVING


def test_message_over_the_limit_is_refused(worker: Any) -> None:
    limit = worker.server.config.max_message_mib * 2**20
    with grpc.insecure_channel(
        worker.server.address, options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        from conclave.protos.worker_pb2_grpc import WorkerServiceStub

        with pytest.raises(grpc.RpcError) as caught:
            list(WorkerServiceStub(channel).Generate(ask(pb.Prompt(text="x" * (limit + 1)))))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
