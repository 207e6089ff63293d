"""Carries out what a strategy asks for: calls to members, alarms, and what the caller hears.

One `EnsembleRun` is one answer. Commands are done at once; what comes of them arrives in one queue
and is sent to the strategy in order of arrival. Whatever way the run ends, no call is left open.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...protos import ensemble_pb2
from ...protos.ensemble_pb2 import EnsembleReport
from ...protos.generation_pb2 import (
    Delta,
    Finished,
    GenerateRequest,
    GenerateResponse,
    ScoreRequest,
    Timings,
    TokenIds,
    Usage,
)
from ...worker.errors import ConclaveError, Unavailable
from ..ensemble.calls import (
    Alarm,
    Answer,
    Ask,
    Broke,
    Command,
    Disarm,
    Drop,
    Ended,
    Heard,
    Judge,
    Judged,
    QuorumNotMet,
    Rang,
    Reply,
    Say,
    Strategy,
    Verdict,
)
from ..ensemble.panel import wish_of
from ..ensemble.spec import Spec
from ..routing.budget import Budget
from ..routing.registry import Worker
from ..status import Failure
from .admission import Ask as Admitted
from .alarms import Alarms, Ring
from .allowance import Allowance
from .dispatch import Dispatcher
from .member_call import MemberCall
from .opening import most_prompt_tokens, size
from .relay import Write

NO_ROOM = "the ensemble's cap on tokens or cost leaves no room for this call"


class EnsembleRun:
    """One answer by several members.

    Args:
        dispatcher: brings calls to workers.
        spec: the ensemble; its members are those that are left after shrinking.
        seats: each member's worker, if it has one.
        asked_width: members before shrinking.
        request: what is asked; its seed is set.
        ask: the caller's deadline, priority and so on.
        write: takes the events.
        hedges: what hedging may cost.
        unary: whether the caller sees nothing before the end, so that a failure is a status.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        spec: Spec,
        seats: Sequence[Worker | None],
        asked_width: int,
        request: GenerateRequest,
        ask: Admitted,
        write: Write,
        hedges: Budget,
        unary: bool,
    ) -> None:
        self.dispatcher = dispatcher
        self.spec = spec
        self.seats = seats
        self.request = request
        self.ask = ask
        self._replies: asyncio.Queue[Reply | Ring] = asyncio.Queue()
        self.calls: dict[int, MemberCall] = {}
        self.allowance = _allowance(spec)
        self.begun = False
        self._asked_width = asked_width
        self._write = write
        self._hedges = hedges
        self._unary = unary
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.alarms = Alarms(self.ring)
        self._reports: list[MemberCall] = []
        self._started = time.monotonic()
        self._first_token: float | None = None
        self._told_tokens = 0
        self._whole: list[Any] | None = [] if request.whole else None

    def prepare(self) -> None:
        """Whatever must be settled before anything is asked."""

    async def run(self, strategy: Strategy) -> None:
        """Until the end of the answer. Raises what the caller is to be told if nothing began."""
        try:
            self.prepare()
            verdict = await self._follow(strategy)
            await self._finish(verdict)
        except (ConclaveError, Failure) as error:
            failure = self._failure(error)
            if self._unary or not self.begun:
                raise failure from error
            await self._write(failure.event(self.request.request_id))
        finally:
            strategy.close()
            self._stop()

    async def _follow(self, strategy: Strategy) -> Verdict:
        try:
            commands = next(strategy)
            while True:
                for command in commands:
                    await self.do(command)
                reply = await self._next_reply()
                commands = strategy.send(reply)
        except StopIteration as stop:
            verdict: Verdict = stop.value
            for command in verdict.last:
                await self.do(command)
            return verdict

    def reply(self, reply: Reply) -> None:
        """Something has come of a command; the strategy hears of it in its turn."""
        self._replies.put_nowait(reply)

    def ring(self, ring: Ring) -> None:
        """An alarm rings; the strategy hears of it in its turn, if it still counts by then."""
        self._replies.put_nowait(ring)

    async def do(self, command: Command) -> None:
        """Carry a command out."""
        match command:
            case Ask():
                self._start(command.call, self._member_call(command), lambda: self._answer(command))
            case Judge():
                call = self._member_call(command)
                self._start(command.call, call, lambda: self._judge(command, call))
            case Drop():
                self._drop(command.call, "another one was chosen")
            case Alarm():
                self.alarms.arm(command)
            case Disarm():
                self.alarms.disarm(command.name)
            case Say():
                await self.say(command.event)
            case _:
                raise AssertionError(f"{command} is for stepped runs")

    async def say(self, event: GenerateResponse) -> None:
        """Pass new tokens on, without what the caller did not ask for."""
        self._told_tokens += len(event.delta.tokens)
        if self._first_token is None:
            self._first_token = time.monotonic() - self._started
        if not self.request.sampling.HasField("logprobs"):
            for token in event.delta.tokens:
                token.ClearField("logprob")
                token.ClearField("rank")
        event.request_id = self.request.request_id
        if self._whole is not None:
            self._whole.extend(event.delta.tokens)
            return
        self.begun = True
        await self._write(event)

    async def _next_reply(self) -> Reply:
        """The next reply; what has ended meanwhile is reported to the caller first."""
        while isinstance(reply := await self._replies.get(), Ring):
            if self.alarms.take(reply):
                reply = self._rang(reply.alarm)
                break
        if self._whole is None:
            while self._reports:
                call = self._reports.pop(0)
                await self._write(
                    GenerateResponse(
                        request_id=self.request.request_id,
                        member=call.report(None, self.spec.message.include_texts),
                    )
                )
                self.begun = True
        return reply

    def _member_call(self, command: Ask | Judge) -> MemberCall:
        call = MemberCall(command.member, command.role, self.seats[command.member])
        self.calls[command.call] = call
        return call

    def _start(self, number: int, call: MemberCall, work: Callable[[], Awaitable[Reply]]) -> None:
        async def carry() -> None:
            try:
                async with asyncio.timeout(self.spec.timeout):
                    reply = await work()
                state, reason = ensemble_pb2.MEMBER_STATE_ANSWERED, ""
            except TimeoutError:
                reason = f"no answer within {self.spec.timeout:g} s"
                state = ensemble_pb2.MEMBER_STATE_LEFT_BEHIND
                reply = Broke(number, Unavailable(reason))
            except (ConclaveError, Failure) as error:
                call.error = error
                reason, state = str(error), ensemble_pb2.MEMBER_STATE_FAILED
                reply = Broke(number, error)
            self._end(call, state, reason)
            self.reply(reply)

        self._tasks[number] = asyncio.create_task(carry(), name=f"member {call.member}")

    def _end(self, call: MemberCall, state: "ensemble_pb2.MemberState", reason: str = "") -> None:
        call.end(state, reason)
        used = call.prompt_tokens + call.completion_tokens
        self.allowance.give_back(call.reserved - used, call.price)
        call.reserved = 0
        self._reports.append(call)

    def _drop(self, number: int, reason: str) -> None:
        task = self._tasks.pop(number, None)
        if task is not None and not task.done():
            task.cancel()
            self._end(self.calls[number], ensemble_pb2.MEMBER_STATE_CANCELLED, reason)

    async def _answer(self, command: Ask) -> Reply:
        """A member's whole answer; each event of a live one goes to the strategy as well."""
        call = self.calls[command.call]
        request = self._member_request(command, call)

        async def heard(event: GenerateResponse) -> None:
            if event.HasField("failed"):
                raise Failure.of_event(event.failed.error)
            call.hear(event)
            if command.live and event.HasField("delta"):
                self.reply(Heard(command.call, event))

        ask = size(request, self.member_ask(command.member))
        await self.dispatcher.stream(ask, request, heard)
        return Ended(command.call, call.answer())

    def _member_request(self, command: Ask, call: MemberCall) -> GenerateRequest:
        request = GenerateRequest()
        request.CopyFrom(self.request)
        request.request_id = f"{self.request.request_id}/{command.call}"
        request.whole = not command.live
        sampling = request.sampling
        if command.seed is not None:
            sampling.seed = command.seed
        if command.prompt is not None:
            request.prompt.CopyFrom(command.prompt)
        if not sampling.HasField("logprobs"):
            sampling.logprobs = 0
        self._limit(request, call)
        return request

    def _limit(self, request: GenerateRequest, call: MemberCall) -> None:
        """Keep within the caps. Raises Unavailable if the call may not begin."""
        if self.allowance.unlimited:
            return
        prompt, sampling = most_prompt_tokens(request.prompt), request.sampling
        wanted = sampling.max_tokens if sampling.HasField("max_tokens") else 1 << 20
        granted = self.allowance.grant(prompt, wanted, call.price)
        if not granted:
            raise Unavailable(NO_ROOM)
        sampling.max_tokens = granted
        call.reserved = prompt + granted

    def member_ask(self, member: int) -> Admitted:
        """An ask for one member's worker, with the caller's deadline and priority."""
        wish = wish_of(member, self.spec.members, self.seats)
        ask = Admitted(wish, self.ask.remaining, priority=self.ask.priority, resume=self.ask.resume)
        if self.seats[member] is None and self._seated() >= self.spec.quorum:
            ask.patience_ends = 0.0  # the others are enough: nobody waits for a missing worker
        return ask

    def _seated(self) -> int:
        return sum(worker is not None for worker in self.seats)

    async def _judge(self, command: Judge, call: MemberCall) -> Reply:
        request = ScoreRequest(
            request_id=f"{self.request.request_id}/{command.call}", context=self.request.prompt
        )
        one_tokenizer = len({worker.tokenizer for worker in self.seats if worker}) == 1
        for answer in command.answers:
            if one_tokenizer:
                request.continuations.add(token_ids=TokenIds(ids=[t.id for t in answer.tokens]))
            else:
                request.continuations.add(text=answer.text)
        self._afford_judging(request, call)
        ask = size(request, self.member_ask(command.member))
        response = await self.dispatcher.score(ask, request)
        call.prompt_tokens = response.usage.prompt_tokens
        means = [score.logprob / max(1, score.scored_tokens) for score in response.scores]
        return Judged(command.call, tuple(means))

    def _afford_judging(self, request: ScoreRequest, call: MemberCall) -> None:
        """Keep within the caps: every continuation is computed behind the whole context."""
        if self.allowance.unlimited:
            return
        sizes = [len(each.token_ids.ids) or each.ByteSize() for each in request.continuations]
        needed = len(sizes) * most_prompt_tokens(request.context) + sum(sizes)
        if not self.allowance.afford(needed, call.price):
            raise Unavailable(NO_ROOM)
        call.reserved = needed + 1

    def _rang(self, alarm: Alarm) -> Rang:
        hedging = self.spec.strategy == "hedge"
        return Rang(alarm.name, not hedging or self._hedges.spend(alarm.keep))

    async def _finish(self, verdict: Verdict) -> None:
        for number in tuple(self._tasks):
            self._drop(number, "the outcome could no longer change")
        if verdict.answer is not None:
            await self.say(_delta(verdict.answer))
        if self._whole:
            delta = Delta(tokens=self._whole)
            await self._write(GenerateResponse(request_id=self.request.request_id, delta=delta))
        finished = self._finished(verdict)
        self.begun = True
        await self._write(GenerateResponse(request_id=self.request.request_id, finished=finished))

    def _finished(self, verdict: Verdict) -> Finished:
        winner = self.calls[verdict.winner]
        total = time.monotonic() - self._started
        finished = Finished(
            outputs=[verdict.end],
            usage=Usage(
                prompt_tokens=winner.prompt_tokens,
                completion_tokens=self._told_tokens,
            ),
            timings=Timings(first_token=self._first_token or total, total=total),
            worker=winner.report(None, False).worker,
            model=winner.worker.model if winner.worker else "",
            ensemble=self._report(verdict),
        )
        if winner.finished is not None:
            finished.usage.cached_tokens = winner.finished.usage.cached_tokens
            finished.resumes = winner.finished.resumes
        return finished

    def _report(self, verdict: Verdict) -> EnsembleReport:
        calls = self.calls
        with_texts = self.spec.message.include_texts
        return EnsembleReport(
            strategy=self.spec.strategy,
            members=[
                call.report(verdict.marks.get(number), with_texts) for number, call in calls.items()
            ],
            asked_width=self._asked_width,
            width=len(self.spec.members),
            total_tokens=sum(c.prompt_tokens + c.completion_tokens for c in calls.values()),
            cost=sum(call.cost for call in calls.values()),
            agreement=verdict.agreement,
        )

    def _failure(self, error: ConclaveError | Failure) -> Failure:
        """What to tell the caller; its own mistake says more than that the quorum was missed."""
        if isinstance(error, QuorumNotMet):
            for call in self.calls.values():
                if isinstance(call.error, Failure) and call.error.says_more:
                    return call.error
        return error if isinstance(error, Failure) else Failure.of_error(error)

    def _stop(self) -> None:
        """Leave nothing open."""
        self.alarms.stop()
        for task in self._tasks.values():
            task.cancel()


def _allowance(spec: Spec) -> Allowance:
    message = spec.message
    return Allowance(
        float(message.max_total_tokens) if message.HasField("max_total_tokens") else None,
        message.max_cost if message.HasField("max_cost") else None,
    )


def _delta(answer: Answer) -> GenerateResponse:
    return GenerateResponse(delta=Delta(tokens=answer.tokens))
