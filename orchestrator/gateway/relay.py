"""One stream on its way from a worker to its caller, which can go on with another worker.

It remembers what the caller has been sent, so a broken stream continues behind its last token: the
next worker gets the tokens made so far (`GenerateRequest.made`) and must have the same weights.
Draws are functions of the seed and the token's index, so even a sampled answer goes on as it would
have. What it costs: the token ids of open streams stay in memory.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import grpc

from ...protos.generation_pb2 import GenerateRequest, GenerateResponse, Timings, Usage
from ...protos.worker_pb2 import ConverseRequest, Reply
from ...worker.errors import Unavailable
from ..lines.conversation import Pending
from ..status import Failure
from .pacer import Pacer

Write = Callable[[GenerateResponse], Awaitable[None]]
SHORTEST_PAUSE = 0.002
"""Seconds; the loop's timers are no finer."""


class Relay:
    """The state of one stream.

    Args:
        request: what was asked; its seed is set here if it has none.
        write: takes the events.
        pacer: says how often.
    """

    def __init__(self, request: GenerateRequest, write: Write, pacer: Pacer) -> None:
        if not request.sampling.HasField("seed"):
            request.sampling.seed = random.getrandbits(63)
        self.request_id = request.request_id
        self.begun = False
        """Whether the caller has been sent anything."""
        self.progressed = False
        """Whether anything came from the present worker."""
        self.moves = 0
        """How often the stream has gone on elsewhere."""
        self.usage: Usage | None = None
        """Tokens by the worker's own count, once it has ended well."""
        self._request = request
        self._write = write
        self._pacer = pacer
        self._sent_at = 0.0
        self._started = time.monotonic()
        self._first_token: float | None = None
        self._made: dict[int, list[int]] = {
            index: list(made.ids) for index, made in enumerate(request.made)
        }
        self._prompt_sent = False
        self._turns = 0

    def message(self) -> ConverseRequest:
        """What to ask the next worker."""
        self._turns += 1
        self.progressed = False
        if self._turns == 1:
            return ConverseRequest(generate=self._request)
        request = GenerateRequest()
        request.CopyFrom(self._request)
        # The first turn may not have left its worker yet, and ids are unique there.
        request.request_id = f"{self.request_id}~{self._turns}"
        if self.begun:
            self.moves += 1
            del request.made[:]
            for index in range(max(self._made, default=-1) + 1):
                request.made.add(ids=self._made.get(index, ()))
            if self._prompt_sent:
                request.sampling.ClearField("prompt_logprobs")
        return ConverseRequest(generate=request)

    async def run(self, pending: Pending) -> Failure | None:
        """Pass a worker's events on; returns why the end is missing, if it is."""
        self._pacer.streams += 1
        try:
            while True:
                event = await self._next(pending)
                match event.WhichOneof("event"):
                    case "delta":
                        self._note(event)
                    case "finished":
                        self._finish(event)
                    case "failed":
                        return Failure.of_event(event.failed.error)
                await self._send(event)
                if event.HasField("finished"):
                    return None
        except Failure as failure:
            return failure
        finally:
            self._pacer.streams -= 1

    async def _next(self, pending: Pending) -> GenerateResponse:
        """The next event; with many streams open, those behind it ride along. Raises Failure."""
        if self._pacer.pause < SHORTEST_PAUSE:
            return _event_of(await pending.next())
        early = self._sent_at + self._pacer.pause - time.monotonic()
        if early > SHORTEST_PAUSE:
            await asyncio.sleep(early)
        event = _event_of(await pending.next())
        while event.HasField("delta") and (reply := pending.peek()) is not None:
            more = reply.event
            if not more.HasField("delta") or more.delta.output_index != event.delta.output_index:
                break
            await pending.next()
            event.delta.MergeFrom(more.delta)
        return event

    async def fail(self, failure: Failure) -> None:
        """End a stream that has begun with its one `failed` event."""
        await self._write(failure.event(self.request_id))

    def _note(self, event: GenerateResponse) -> None:
        delta = event.delta
        if self._first_token is None and delta.tokens:
            self._first_token = time.monotonic() - self._started
        self._made.setdefault(delta.output_index, []).extend([t.id for t in delta.tokens])
        self._prompt_sent = self._prompt_sent or bool(delta.prompt_tokens)

    def _finish(self, event: GenerateResponse) -> None:
        finished = event.finished
        self.usage = finished.usage
        if self.moves:
            # The last worker's clock knows only its own part.
            finished.resumes = self.moves
            total = time.monotonic() - self._started
            timings = Timings(first_token=self._first_token or total, total=total)
            finished.timings.CopyFrom(timings)

    async def _send(self, event: GenerateResponse) -> None:
        if self._turns > 1:
            event.request_id = self.request_id
        self.begun = self.progressed = True
        await self._write(event)
        self._sent_at = time.monotonic()


def _event_of(reply: Reply) -> GenerateResponse:
    if reply.last:
        raise Failure.of_error(Unavailable("the worker sent no end"))
    return reply.event


def may_move(failure: Failure) -> bool:
    """Whether another worker may do better."""
    return failure.code is grpc.StatusCode.UNAVAILABLE
