"""Callers who ask a gateway for all kinds of answers at once, and write down all that they see.

They speak the bare protocol, without the client library, so that nothing is smoothed over.
"""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.rpc import code_pb2

from conclave.orchestrator.status import Failure
from conclave.protos import gateway_pb2
from conclave.protos import generation_pb2 as pb

from .ledger import Ledger

DEADLINE_SECONDS = 40.0
"""Of every ask; one that is left hanging ends with DEADLINE_EXCEEDED, which nothing excuses."""
RETRY_SECONDS = 0.1
"""A caller whose call broke does not ask again at once."""
PATIENCE_SECONDS = DEADLINE_SECONDS + 10.0

Truths = Callable[[pb.GenerateRequest], Mapping[int, Sequence[int]] | None]
"""What every output of a request must become, if that is known."""


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask: a generation, as a stream or in one message, or a score."""

    request: pb.GenerateRequest
    streams: bool = True
    scores: int | None = None

    @property
    def outputs(self) -> int:
        """How many answers it wants."""
        sampling = self.request.sampling
        return sampling.n if sampling.HasField("n") else 1


Pool = Callable[[random.Random], Question]
"""Draws the next thing to ask."""


class Callers:
    """Asks questions and notes what comes."""

    def __init__(self, front: Any, ledger: Ledger, truths: Truths) -> None:
        self.front = front
        self.ledger = ledger
        self.truths = truths
        self.tokens_seen = 0
        self._numbers = itertools.count(1)

    async def ask(self, question: Question, request_id: str = "") -> bool:
        """One question, to its end; whether it was answered."""
        request = pb.GenerateRequest()
        request.CopyFrom(question.request)
        request.request_id = request_id or self.new_id()
        self._note_ask(request, question)
        try:
            if question.scores is not None:
                await self._score(request, question.scores)
            elif question.streams:
                await self._stream(request)
            else:
                await self._whole(request)
        except grpc.aio.AioRpcError as error:
            self._note_status(request.request_id, error)
            return False
        return True

    async def give_up(self, question: Question, seconds: float) -> bool:
        """Asks, and cancels after a while; whether that came before the end."""
        request_id = self.new_id()
        task = asyncio.create_task(self.ask(question, request_id))
        await asyncio.wait((task,), timeout=seconds)
        if task.done():
            task.result()
            return False
        self.ledger.note("cancel", request=request_id)
        task.cancel()
        await asyncio.wait((task,))
        return True

    def new_id(self) -> str:
        """A request id that was not used before."""
        return f"r{next(self._numbers)}"

    def _note_ask(self, request: pb.GenerateRequest, question: Question) -> None:
        truth = None if question.scores is not None else self.truths(request)
        self.ledger.note(
            "ask",
            request=request.request_id,
            streams=question.streams,
            outputs=question.outputs,
            tokens=request.sampling.max_tokens,
            exact=request.sampling.ignore_eos,
            scores=question.scores,
            truth=None if truth is None else {str(k): list(v) for k, v in truth.items()},
        )

    async def _stream(self, request: pb.GenerateRequest) -> None:
        envelope = gateway_pb2.GatewayGenerateRequest(request=request)
        call = self.front.Generate(envelope, timeout=DEADLINE_SECONDS)
        counts: dict[int, int] = {}
        async for event in call:
            kind = event.WhichOneof("event")
            if kind == "delta":
                self._note_tokens(request.request_id, event.delta, counts)
            elif kind == "finished":
                finished = event.finished
                self._note_finished(request, finished.outputs, finished.worker, finished.resumes)
            elif kind == "failed":
                error = event.failed.error
                name = code_pb2.Code.Name(error.code)
                self._note_end(request.request_id, "failed", name, error.message)

    def _note_tokens(self, request: str, delta: pb.Delta, counts: dict[int, int]) -> None:
        output, ids = delta.output_index, [token.id for token in delta.tokens]
        index = counts.get(output, 0)
        counts[output] = index + len(ids)
        self.tokens_seen += len(ids)
        self.ledger.note("tokens", request=request, output=output, index=index, ids=ids)

    async def _whole(self, request: pb.GenerateRequest) -> None:
        envelope = gateway_pb2.CompleteRequest(request=request)
        answer = await self.front.Complete(envelope, timeout=DEADLINE_SECONDS)
        for place, output in enumerate(answer.outputs):
            delta = pb.Delta(output_index=place, tokens=output.tokens)
            self._note_tokens(request.request_id, delta, {})
        ends = [output.end for output in answer.outputs]
        self._note_finished(request, ends, answer.worker, answer.resumes)

    async def _score(self, request: pb.GenerateRequest, count: int) -> None:
        texts = [pb.Continuation(text=f"text {number}") for number in range(count)]
        score = pb.ScoreRequest(
            request_id=request.request_id, context=request.prompt, continuations=texts
        )
        envelope = gateway_pb2.GatewayScoreRequest(request=score)
        answer = await self.front.Score(envelope, timeout=DEADLINE_SECONDS)
        scored = sum(each.scored_tokens > 0 for each in answer.scores)
        self.ledger.note("scored", request=request.request_id, count=scored)
        self._note_finished(request, [], answer.worker, 0)

    def _note_finished(
        self, request: pb.GenerateRequest, ends: Sequence[pb.OutputEnd], worker: str, resumes: int
    ) -> None:
        self.ledger.note(
            "end",
            request=request.request_id,
            how="finished",
            worker=worker,
            counts={str(end.output_index): end.completion_tokens for end in ends},
            reasons={
                str(end.output_index): pb.FinishReason.Name(end.reason).rpartition("_")[2]
                for end in ends
            },
            resumes=resumes,
        )

    def _note_status(self, request: str, error: grpc.aio.AioRpcError) -> None:
        failure = Failure.of_call(error)
        name = error.code().name
        if name == "RESOURCE_EXHAUSTED" and failure.retry_after is None:
            name = "RESOURCE_EXHAUSTED without RetryInfo"
        self._note_end(request, "status", name, failure.message)

    def _note_end(self, request: str, how: str, code: str, message: str) -> None:
        self.ledger.note("end", request=request, how=how, code=code, message=message)


class Crowd:
    """So many callers, each asking again and again until they are told to stop."""

    def __init__(self, callers: Callers, pool: Pool, size: int, seed: int) -> None:
        self.size = size
        self._callers = callers
        self._pool = pool
        self._seed = seed
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """While the body runs, and until every open ask has ended."""
        seen = self._callers.tokens_seen
        self._tasks = [asyncio.create_task(self._caller(number)) for number in range(self.size)]
        try:
            while self._callers.tokens_seen < seen + 4 * self.size:
                await asyncio.sleep(0.02)
            yield
        finally:
            self._stopping = True
            _, hanging = await asyncio.wait(self._tasks, timeout=PATIENCE_SECONDS)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=bool(hanging))

    async def _caller(self, number: int) -> None:
        draw = random.Random(f"{self._seed} {number}")
        while not self._stopping:
            if not await self._callers.ask(self._pool(draw)):
                await asyncio.sleep(RETRY_SECONDS)


def mixture(prompts: Sequence[pb.Prompt], lengths: Sequence[int], most_outputs: int = 3) -> Pool:
    """Streams and unary asks, greedy and sampled, of one or several outputs, and some scores."""

    def draw(random: random.Random) -> Question:
        prompt = random.choice(prompts)
        kind = random.choices(("stream", "whole", "score"), (7, 2, 1))[0]
        sampling = pb.SamplingParams(
            temperature=random.choice((0.0, 0.8)),
            seed=random.randrange(4),
            max_tokens=random.choice(lengths),
            ignore_eos=random.random() < 0.5,
        )
        if random.random() < 0.2:
            sampling.n = random.randint(2, most_outputs)
        request = pb.GenerateRequest(prompt=prompt, sampling=sampling)
        scores = random.randint(1, 3) if kind == "score" else None
        return Question(request, streams=kind == "stream", scores=scores)

    return draw
