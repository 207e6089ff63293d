"""Carries out token-level strategies: one open Step call for each member.

Nothing waits for a write: a member has answered before it is given anything more, so at most one
request is under way on each line.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from ...protos import ensemble_pb2
from ...protos.generation_pb2 import Delta, GenerateRequest, GenerateResponse, Token
from ...protos.worker_pb2 import StepOpen, StepRequest, StepResponse, StepTake
from ...worker.errors import ConclaveError, Unavailable
from ..ensemble.calls import (
    Alarm,
    Command,
    Lost,
    Open,
    Rang,
    Reply,
    Shut,
    Stepped,
    Strategy,
    Take,
    Tell,
    Verdict,
)
from ..lines.step_line import StepLine
from ..routing.registry import Worker
from ..status import Failure
from .admission import Ask as Admitted
from .alarms import Ring
from .ensembles import NO_ROOM, EnsembleRun
from .member_call import MemberCall
from .opening import most_prompt_tokens, size

TELL_SECONDS = 0.002
"""How long a token may be kept until the members have been given it, who come first."""


@dataclass(slots=True)
class _Lease:
    """A member's worker while it is stepped."""

    ask: Admitted
    worker: Worker
    line: StepLine


class SteppedRun(EnsembleRun):
    """One answer made token by token."""

    _leases: dict[int, _Lease]
    _opening: dict[int, asyncio.Task[None]]
    _untold: list[Token]
    _telling: asyncio.Task[None] | None
    _tells_at: asyncio.TimerHandle | None
    _gave: bool
    """Whether the strategy's last word gave a member something to do."""
    _strategy: Strategy
    _verdict: asyncio.Future[Verdict]
    _arrived: deque[Reply]
    _advancing: bool

    async def _follow(self, strategy: Strategy) -> Verdict:
        self._strategy, self._verdict = strategy, asyncio.get_running_loop().create_future()
        self._advance(None)
        verdict = await self._verdict
        for command in verdict.last:
            self._carry_out(command)
        return verdict

    def reply(self, reply: Reply) -> None:
        """The strategy hears of it at once: a queue and a task's turn would cost every token."""
        self._arrived.append(reply)
        if not self._advancing and not self._verdict.done():
            self._advance(self._arrived.popleft())

    def ring(self, ring: Ring) -> None:
        """An alarm rings; as of `reply`, at once."""
        if self.alarms.take(ring):
            self.reply(Rang(ring.alarm.name))

    def _advance(self, reply: Reply | None) -> None:
        """Carry out what follows from a reply, None at the start, and from those it brings."""
        self._advancing = True
        try:
            while True:
                self._gave = False
                for command in self._strategy.send(reply):  # type: ignore[arg-type]
                    self._carry_out(command)
                if self._gave and self._untold:
                    self._start_telling()
                if not self._arrived:
                    return
                reply = self._arrived.popleft()
        except StopIteration as stop:
            self._verdict.set_result(stop.value)
        except Exception as error:
            self._verdict.set_exception(error)
        finally:
            self._advancing = False

    def _carry_out(self, command: Command) -> None:
        match command:
            case Open():
                self._begin(command)
            case Alarm():
                self.alarms.arm(command)
            case Take():
                lease = self._leases.get(command.member)
                if lease is not None:
                    take = StepTake(ids=command.ids, generate=command.generate)
                    lease.line.send(StepRequest(take=take))
                    self._gave = True
            case Shut():
                self._give_back(command.member, None)
                state = ensemble_pb2.MEMBER_STATE_LEFT_BEHIND
                self.calls[command.member].end(state, command.reason)
            case Tell():
                self._untold.append(command.token)
                if self._telling is None and self._tells_at is None:
                    loop = asyncio.get_running_loop()
                    self._tells_at = loop.call_later(TELL_SECONDS, self._start_telling)
            case _:
                raise AssertionError(f"{command} is not for stepped runs")

    def prepare(self) -> None:
        """Take the whole answer's share of the caps, before anything is asked."""
        self._leases, self._opening = {}, {}
        self._untold, self._telling, self._tells_at = [], None, None
        self._gave = False
        self._arrived, self._advancing = deque(), False
        if self.allowance.unlimited:
            return
        sampling, width = self.request.sampling, len(self.seats)
        prompt = most_prompt_tokens(self.request.prompt)
        wanted = sampling.max_tokens if sampling.HasField("max_tokens") else 1 << 20
        prices = [worker.cost if worker else 1.0 for worker in self.seats]
        granted = self.allowance.grant(prompt * width, wanted * width, sum(prices) / width)
        if granted < width:
            raise Unavailable(NO_ROOM)
        sampling.max_tokens = granted // width

    def _start_telling(self) -> None:
        if self._tells_at is not None:
            self._tells_at.cancel()
            self._tells_at = None
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell(), name="telling")

    async def _tell(self) -> None:
        """Writes while the members make the next token, which does not wait for the caller."""
        while self._untold:
            tokens, self._untold = self._untold, []
            await self.say(GenerateResponse(delta=Delta(tokens=tokens)))
        self._telling = None

    def _begin(self, command: Open) -> None:
        call = self.calls.get(command.member)
        if call is None:
            seat = self.seats[command.member]
            self.calls[command.member] = MemberCall(command.member, "answer", seat)
        elif not self._affords_again(command, call):
            return
        self._opening[command.member] = asyncio.create_task(
            self._open(command), name=f"opening member {command.member}"
        )

    def _affords_again(self, command: Open, call: MemberCall) -> bool:
        """Whether the caps leave room to compute the answer so far again; else it stays lost."""
        needed = most_prompt_tokens(self.request.prompt) + len(command.made)
        if self.allowance.unlimited or self.allowance.afford(needed, call.price):
            return True
        self._lose(command.member, Unavailable(NO_ROOM))
        return False

    async def _open(self, command: Open) -> None:
        member, request = command.member, self._step_request(command)
        try:
            ask = size(request, self.member_ask(member))
            worker, line = await self.dispatcher.step(ask)
        except (ConclaveError, Failure) as error:
            self._lose(member, error)
            return
        self.calls[member].worker = worker
        self._leases[member] = _Lease(ask, worker, line)
        line.start(
            lambda response: self._hear(member, response),
            lambda failure: self._break(member, failure),
        )
        opening = StepOpen(
            request=request, candidates=command.candidates, generate=command.generate
        )
        line.send(StepRequest(open=opening))

    def _step_request(self, command: Open) -> GenerateRequest:
        request = GenerateRequest()
        request.CopyFrom(self.request)
        request.whole = False
        request.request_id = f"{self.request.request_id}/{command.member}"
        if command.made:
            request.made.add(ids=command.made)
        if command.generate and not request.sampling.HasField("logprobs"):
            request.sampling.logprobs = 0
        return request

    def _hear(self, member: int, response: StepResponse) -> None:
        call = self.calls[member]
        opened = response.opened if response.HasField("opened") else None
        if opened is not None:
            call.prompt_tokens += len(opened.prompt_ids)
            call.state = ensemble_pb2.MEMBER_STATE_ASKED
        call.completion_tokens = response.position
        self.reply(
            Stepped(
                member,
                response.position,
                tuple(response.tokens),
                response.end if response.HasField("end") else None,
                response.ids,
                response.logprobs,
                opened,
            )
        )

    def _break(self, member: int, failure: Failure) -> None:
        self._give_back(member, failure)
        self._lose(member, failure)

    def _lose(self, member: int, error: Exception) -> None:
        call = self.calls[member]
        call.error = error
        call.end(ensemble_pb2.MEMBER_STATE_FAILED, str(error))
        self.reply(Lost(member, error))

    def _give_back(self, member: int, failure: Failure | None) -> None:
        lease = self._leases.pop(member, None)
        if lease is not None:
            self.dispatcher.end_step(lease.ask, lease.worker, lease.line, failure)

    async def _finish(self, verdict: Verdict) -> None:
        for call in self.calls.values():
            if call.state == ensemble_pb2.MEMBER_STATE_ASKED:
                call.end(ensemble_pb2.MEMBER_STATE_ANSWERED)
        if self._untold:
            self._start_telling()
        if self._telling is not None:
            await self._telling
        await super()._finish(verdict)

    def _stop(self) -> None:
        super()._stop()
        if self._tells_at is not None:
            self._tells_at.cancel()
        if self._telling is not None:
            self._telling.cancel()
        for task in self._opening.values():
            task.cancel()
        for member in tuple(self._leases):
            self._give_back(member, None)
