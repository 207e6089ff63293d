"""`conclave.v1.WorkerService` on an engine: messages in, events out, on one asyncio loop.

The loop never computes: long prompts are tokenised in a thread, tokens are made in the engine's
thread and arrive through `call_soon_threadsafe`. Whatever way a call ends, by its last event, a
cancel, a deadline or a lost connection, its request leaves the engine through the one `finally`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import grpc

from ...protos import generation_pb2, worker_pb2, worker_pb2_grpc
from ..config import WorkerConfig
from ..engine import Engine
from ..errors import ConclaveError, InvalidRequest, Unavailable
from ..requests.completion import Completion
from ..requests.completion import Score as ScoreResult
from ..requests.events import (
    Delta,
    Event,
    Failed,
    Finished,
    Stepped,
    TokenRecord,
    Usage,
)
from . import wire
from .asks import Asks, Build
from .conversation import MESSAGE_BYTES, Conversation
from .stepping import StepCall

_PAUSE, _SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 0.05, 3600.0
"""Seconds between two heartbeats: default, least, most."""

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """Serves one engine.

    Args:
        engine: answers.
        config: the worker's name and labels.
        incarnation: tells this process from the one before it.
        stop_serving: called when a drain begins; turns the health to NOT_SERVING.
    """

    def __init__(
        self,
        engine: Engine,
        config: WorkerConfig,
        incarnation: str,
        stop_serving: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._config = config
        self._incarnation = incarnation
        self._stop_serving = stop_serving
        self._model = config.engine.model.resolve().name
        self._asks = Asks(engine.intake)

    def open_doors(self) -> None:
        """Take requests from now on."""
        self._asks.closed_reason = None

    # -- rpcs ----------------------------------------------------------------------------------

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Context
    ) -> worker_pb2.DescribeResponse:
        model, limits = self._engine.model, self._engine.intake.limits
        return worker_pb2.DescribeResponse(
            worker=self._config.name,
            model=self._model,
            labels=self._config.labels,
            incarnation=self._incarnation,
            conclave_version=_version(),
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            parameters=model.parameters,
            vocab_size=limits.vocabulary,
            max_context=limits.max_context,
            max_sequences=self._engine.config.max_sequences,
            max_logprobs=limits.max_logprobs,
            max_outputs=limits.max_outputs,
            model_fingerprint=model.fingerprint,
            tokenizer_fingerprint=model.tokenizer.fingerprint,
            has_chat_template=model.tokenizer.has_chat_template,
            precision=wire.precision(model.precision),
        )

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        told = False
        try:
            build = await self._asks.generation(request, _deadline(context))
            async for event in self._answer(build):
                if isinstance(event, Failed) and not told:
                    raise event.error
                told = True
                yield wire.response(request.request_id, event, self._config.name, self._model)
        except ConclaveError as error:
            await _abort(context, error)

    async def Complete(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.CompleteResponse:
        deltas: list[Delta] = []
        request.whole = True
        try:
            build = await self._asks.generation(request, _deadline(context))
            async for event in self._answer(build):
                if isinstance(event, Delta):
                    deltas.append(event)
                    continue
                if isinstance(event, Failed):
                    raise event.error
                whole = Completion.of(deltas, event)
        except ConclaveError as error:
            await _abort(context, error)
        return wire.completion(request.request_id, whole, self._config.name, self._model)

    async def Score(
        self, request: generation_pb2.ScoreRequest, context: Context
    ) -> generation_pb2.ScoreResponse:
        try:
            first, *rest = await self._asks.scoring(request, _deadline(context))
            # The first one leaves the context's blocks in the prefix cache for the others.
            scores = [await self._score(first)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._score(each)) for each in rest]
            scores += [task.result() for task in tasks]
        except* ConclaveError as errors:
            await _abort(context, _first(errors))
        return generation_pb2.ScoreResponse(
            request_id=request.request_id,
            scores=[wire.score(each, request.HasField("logprobs")) for each, _ in scores],
            worker=self._config.name,
            model=self._model,
            usage=wire.usage(_sum([spent for _, spent in scores])),
        )

    async def Converse(self, requests: object, context: Context) -> None:
        await Conversation(self, self._message_bytes(context)).run(context)

    async def Step(self, requests: object, context: Context) -> None:
        deadline = _deadline(context)
        about = worker_pb2.StepOpened(
            worker=self._config.name,
            model=self._model,
            vocab_size=self._engine.intake.limits.vocabulary,
            tokenizer_fingerprint=self._engine.model.tokenizer.fingerprint,
        )
        try:
            await StepCall(
                self._engine,
                lambda message: self._asks.stepping(message, deadline),
                self._asks.open,
                about,
            ).run(context)
        except ConclaveError as error:
            await _abort(context, error)

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: Context
    ) -> worker_pb2.DrainResponse:
        grace = request.grace_seconds if request.HasField("grace_seconds") else None
        completed, aborted = await self.drain(grace)
        return worker_pb2.DrainResponse(completed=completed, aborted=aborted)

    async def GetLoad(
        self, request: worker_pb2.GetLoadRequest, context: Context
    ) -> worker_pb2.GetLoadResponse:
        return self._load()

    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: Context
    ) -> AsyncIterator[worker_pb2.GetLoadResponse]:
        pause = _PAUSE
        if request.HasField("interval_seconds"):
            pause = request.interval_seconds
        if not _SHORTEST_PAUSE <= pause <= _LONGEST_PAUSE:  # NaN is refused too
            rule = f"must lie between {_SHORTEST_PAUSE} and {_LONGEST_PAUSE} seconds"
            await _abort(context, InvalidRequest.of("interval_seconds", rule))
        while True:
            yield self._load()
            await asyncio.sleep(pause)

    async def drain(self, grace: float | None) -> tuple[int, int]:
        """Refuse new asks, wait for the open ones; returns how many ended and how many were ended.

        Args:
            grace: seconds to wait; None waits for all.
        """
        self._asks.closed_reason = "the worker is draining; ask another one"
        self._stop_serving()
        before = len(self._asks.open.ids)
        try:
            await asyncio.wait_for(self._asks.open.ended(), grace)
        except TimeoutError:
            pass
        left = list(self._asks.open.ids)
        for request_id in left:
            self._engine.abort(request_id, Unavailable("the worker has been drained"))
        return before - len(left), len(left)

    # -- one request ---------------------------------------------------------------------------

    async def _score(self, build: Build) -> tuple[ScoreResult, Usage]:
        tokens: list[TokenRecord] = []
        async for event in self._answer(build):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Delta):
                tokens.extend(event.prompt_tokens)
                continue
            spent = event.usage
        return ScoreResult.of(tuple(tokens)), spent

    async def _answer(self, build: Build) -> AsyncIterator[Delta | Finished | Failed]:
        """Submit a request and yield its events; leaving early takes it out of the engine."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Items[Event]]()
        request = await build(lambda events: _pass_on(loop, arrived, events))
        self._engine.submit(request)
        ended = False
        with self._asks.open.track(request.id):
            try:
                while not ended:
                    for event in await arrived.get():
                        assert not isinstance(event, Stepped)
                        ended = isinstance(event, Finished | Failed)
                        yield event
            finally:
                if not ended:
                    self._engine.abort(request.id)

    def _load(self) -> worker_pb2.GetLoadResponse:
        engine = self._engine
        return wire.load(engine.load, engine.step_age, self._asks.closed_reason is not None)

    def _message_bytes(self, context: Context) -> int:
        """What both sides can take in one message, less room for its envelope."""
        own = self._config.max_message_mib * 2**20
        theirs = dict(context.invocation_metadata() or ()).get(MESSAGE_BYTES)
        return (min(own, int(theirs)) if theirs else own) - 1024


def _pass_on(
    loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[Items[Event]], events: Items[Event]
) -> None:
    """Hand events from the engine's thread to the loop; a loop that has closed wants none."""
    try:
        loop.call_soon_threadsafe(arrived.put_nowait, events)
    except RuntimeError:
        pass


async def _abort(context: Context, error: ConclaveError) -> NoReturn:
    code, message, trailing = wire.status(error)
    await context.abort(code, message, trailing)
    raise AssertionError("abort returned")


def _sum(spent: Items[Usage]) -> Usage:
    """What several requests cost together; a context that they share counts for each."""
    return Usage(
        prompt_tokens=sum(each.prompt_tokens for each in spent),
        cached_tokens=sum(each.cached_tokens for each in spent),
        completion_tokens=0,
        preemptions=sum(each.preemptions for each in spent),
    )


def _first(errors: BaseExceptionGroup[ConclaveError]) -> ConclaveError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _deadline(context: Context) -> float | None:
    """The call's deadline on the clock of time.monotonic()."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _version() -> str:
    try:
        return version("conclave-llm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
