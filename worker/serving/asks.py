"""From messages to requests that the engine can run, and which of them are open.

Checks and tokenises; what takes long leaves the loop for a thread.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager

from ...protos import generation_pb2, worker_pb2
from ..errors import InvalidRequest, Unavailable
from ..requests.events import Made, Request, Sink
from ..requests.intake import Intake, new_id
from . import wire

_LONG_TEXT = 4000
"""Characters above which tokenising would hold the loop up for a millisecond or more."""
_LONG_MADE = 64
"""Tokens of begun answers above which the same holds."""

Build = Callable[[Sink], Awaitable[Request]]
"""A checked request that only lacks its sink."""


class OpenAsks:
    """What a worker has to end before it is drained."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def track(self, request_id: str) -> Iterator[None]:
        """Count a request as open for as long as the context lasts."""
        self.ids.add(request_id)
        self._none.clear()
        try:
            yield
        finally:
            self.ids.discard(request_id)
            if not self.ids:
                self._none.set()

    async def ended(self) -> None:
        """Wait until none is open."""
        await self._none.wait()


class Asks:
    """The way of messages into one engine.

    Args:
        intake: the engine's.
    """

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.closed_reason: str | None = "the worker is warming up"
        """Why asks are refused; None while they are taken."""
        self.open = OpenAsks()

    async def generation(
        self, message: generation_pb2.GenerateRequest, deadline: float | None
    ) -> Build:
        """A request for answers; the message gets an id if it has none.

        Raises:
            Unavailable: asks are refused now.
            InvalidRequest: with every field at fault; some of it only when the sink is given.
        """
        self._check_open()
        message.request_id = message.request_id or new_id()
        fields, made = wire.sampling_fields(message.sampling), wire.made(message)
        knobs = wire.knobs(message)
        ids = await self._prompt_ids(message.prompt, "prompt")

        def generation(sink: Sink) -> Request:
            return self._intake.generation(
                ids,
                fields,
                sink,
                request_id=message.request_id,
                deadline=deadline,
                whole=message.whole,
                made=made,
                knobs=knobs,
            )

        return lambda sink: _off_loop_if(_is_long(made), generation, sink)

    async def stepping(self, message: worker_pb2.StepOpen, deadline: float | None) -> Build:
        """A request for one answer that its caller steps; raises as `generation`."""
        self._check_open()
        asked = message.request
        fields, made = wire.sampling_fields(asked.sampling), wire.made(asked)
        knobs = wire.knobs(asked)
        ids = await self._prompt_ids(asked.prompt, "prompt")

        def stepping(sink: Sink) -> Request:
            return self._intake.stepping(
                ids,
                fields,
                sink,
                candidates=message.candidates,
                generate=message.generate,
                made=made,
                request_id=asked.request_id,
                deadline=deadline,
                knobs=knobs,
            )

        return lambda sink: _off_loop_if(_is_long(made), stepping, sink)

    async def scoring(
        self, message: generation_pb2.ScoreRequest, deadline: float | None
    ) -> list[Build]:
        """A request for each continuation; raises as `generation`."""
        self._check_open()
        message.request_id = message.request_id or new_id()
        if not message.continuations:
            raise InvalidRequest.of("continuations", "is empty; give at least one")
        start: list[int] = []
        if message.HasField("context"):
            start = await self._prompt_ids(message.context, "context")

        def scoring(index: int, continuation: generation_pb2.Continuation) -> Build:
            ids = wire.continuation_ids(self._intake, continuation, f"continuations[{index}]")

            async def build(sink: Sink) -> Request:
                return self._intake.scoring(
                    start,
                    ids,
                    sink,
                    candidates=message.logprobs,
                    request_id=f"{message.request_id}/{index}",
                    deadline=deadline,
                )

            return build

        return [scoring(index, each) for index, each in enumerate(message.continuations)]

    def _check_open(self) -> None:
        if self.closed_reason is not None:
            raise Unavailable(self.closed_reason)

    async def _prompt_ids(self, prompt: generation_pb2.Prompt, field: str) -> list[int]:
        if prompt.ByteSize() > _LONG_TEXT:
            return await asyncio.to_thread(wire.prompt_ids, self._intake, prompt, field)
        return wire.prompt_ids(self._intake, prompt, field)


def _is_long(made: Items[Made]) -> bool:
    return sum(len(each.ids) for each in made) > _LONG_MADE


async def _off_loop_if(long: bool, build: Callable[[Sink], Request], sink: Sink) -> Request:
    return await asyncio.to_thread(build, sink) if long else build(sink)
