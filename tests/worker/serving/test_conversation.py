"""Many asks over one call of Converse: each ends as its own call would have."""

import queue
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from conclave.protos import generation_pb2 as pb
from conclave.protos import worker_pb2


class Talk:
    """A call of Converse that a test feeds and reads."""

    def __init__(self, stub: Any, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._out: queue.Queue[worker_pb2.ConverseRequest | None] = queue.Queue()
        self._call = stub.Converse(iter(self._out.get, None), metadata=metadata, timeout=60)
        self._replies: Iterator[worker_pb2.Reply] = (
            reply for message in self._call for reply in message.replies
        )

    def send(self, ask: int, **action: Any) -> None:
        self._out.put(worker_pb2.ConverseRequest(ask=ask, **action))

    def replies(self, asks: int) -> dict[int, list[worker_pb2.Reply]]:
        """All replies until so many asks have ended."""
        got: dict[int, list[worker_pb2.Reply]] = {}
        while sum(replies[-1].last for replies in got.values()) < asks:
            reply = next(self._replies)
            got.setdefault(reply.ask, []).append(reply)
        return got

    def first(self) -> worker_pb2.Reply:
        return next(self._replies)

    def close(self) -> None:
        self._call.cancel()
        self._out.put(None)


@pytest.fixture
def talk(worker: Any) -> Iterator[Talk]:
    talk = Talk(worker.stub)
    yield talk
    talk.close()


def request(tokens: int = 5, seed: int = 20, **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[seed, 21, 22])),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **sampling),
    )


def status(reply: worker_pb2.Reply) -> status_pb2.Status:
    assert reply.WhichOneof("content") == "status" and reply.last
    return status_pb2.Status.FromString(reply.status)


def test_asks_of_all_kinds_run_side_by_side(worker: Any, talk: Talk) -> None:
    for ask in range(1, 9):
        talk.send(ask, generate=request(seed=20 + ask))
    talk.send(9, complete=request(seed=30))
    continuation = pb.Continuation(token_ids=pb.TokenIds(ids=[30, 31]))
    score = pb.ScoreRequest(context=request().prompt, continuations=[continuation])
    talk.send(10, score=score)
    got = talk.replies(10)
    for ask in range(1, 9):
        *events, end = got[ask]
        tokens = [t.id for r in events for t in r.event.delta.tokens]
        alone = worker.stub.Generate(request(seed=20 + ask))
        assert tokens == [t.id for event in alone for t in event.delta.tokens]
        assert events[-1].event.WhichOneof("event") == "finished"
        assert end.last and end.WhichOneof("content") is None
    assert len(got[9]) == 1 and got[9][0].completion.usage.completion_tokens == 5
    assert got[10][0].scores.scores[0].scored_tokens == 2


def test_a_bad_ask_ends_with_its_status_and_spares_the_others(talk: Talk) -> None:
    talk.send(1, generate=request(top_p=5.0))
    talk.send(2, complete=request(top_p=5.0))
    talk.send(3)
    talk.send(4, complete=request())
    got = talk.replies(4)
    for ask in (1, 2, 3):
        assert status(got[ask][0]).code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "sampling.top_p" in status(got[1][0]).message
    assert got[4][0].completion.outputs


def test_cancel_takes_the_ask_out_of_the_engine(worker: Any, talk: Talk) -> None:
    talk.send(1, generate=request(tokens=180))
    assert talk.first().ask == 1
    talk.send(1, cancel=worker_pb2.CancelAsk())
    assert until_idle(worker)
    talk.send(2, complete=request())
    assert 2 in talk.replies(1)


def test_the_end_of_the_call_takes_all_asks_out(worker: Any) -> None:
    talk = Talk(worker.stub)
    for ask in range(1, 6):
        talk.send(ask, generate=request(tokens=180, seed=20 + ask))
    talk.first()
    talk.close()
    assert until_idle(worker)


def test_a_deadline_ends_its_ask(talk: Talk) -> None:
    talk.send(1, generate=request(tokens=180), timeout_seconds=0.05)
    last = talk.replies(1)[1]
    words = [r.event.failed.error.code for r in last if r.event.HasField("failed")]
    words += [status(r).code for r in last if r.WhichOneof("content") == "status"]
    assert words == [grpc.StatusCode.DEADLINE_EXCEEDED.value[0]]


def test_an_answer_too_large_for_the_caller_ends_only_its_ask(worker: Any) -> None:
    talk = Talk(worker.stub, metadata=(("conclave-message-bytes", "3000"),))
    talk.send(1, complete=request(tokens=100, logprobs=20))
    talk.send(2, complete=request(tokens=1))
    got = talk.replies(2)
    assert status(got[1][0]).code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert got[2][0].completion.outputs
    talk.close()


def until_idle(worker: Any) -> bool:
    engine = worker.server.engine
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not engine._open and not any(pool.used for pool in engine.load.pools):
            return True
        time.sleep(0.005)
    return False
