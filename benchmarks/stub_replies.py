"""What a stub worker says: whole answers, steps, scores and refusals, all made up.

They are functions of what was asked, so that any stub gives the same. Given up: any likeness to a
model's.
"""

import math
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from conclave.protos import generation_pb2 as pb
from conclave.protos import worker_pb2

from .stub_machine import VOCABULARY, Refusal, Sequence, Settings

DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Gathered:
    """Makes one answer of a request's events."""

    def __init__(self) -> None:
        self.response = pb.CompleteResponse()
        self._tokens: dict[int, list[pb.Token]] = {}

    def take(self, event: pb.GenerateResponse) -> None:
        """One more event."""
        if event.HasField("delta"):
            self._tokens.setdefault(event.delta.output_index, []).extend(event.delta.tokens)
            return
        finished, response = event.finished, self.response
        response.request_id = event.request_id
        response.usage.CopyFrom(finished.usage)
        response.timings.CopyFrom(finished.timings)
        response.worker, response.model = finished.worker, finished.model
        for end in finished.outputs:
            tokens = self._tokens.get(end.output_index, [])
            response.outputs.add(text="".join(t.text for t in tokens), tokens=tokens, end=end)


class Stepper:
    """One call of Step."""

    def __init__(self, opened: worker_pb2.StepOpen, settings: Settings) -> None:
        request = opened.request
        made = len(request.made[0].ids) if request.made else 0
        self._settings = settings
        self._first = opened
        self._sequence = Sequence.of(request, 0, settings.weights, made)

    def opened(self) -> worker_pb2.StepResponse:
        """The first response."""
        response = self.take([], self._first.generate)
        request = self._first.request
        response.opened.CopyFrom(
            worker_pb2.StepOpened(
                prompt_ids=list(request.prompt.token_ids.ids),
                vocab_size=VOCABULARY,
                sampling=request.sampling,
                stop_ids=sorted(self._sequence.stops),
                worker=self._settings.name,
                model=self._settings.model,
                tokenizer_fingerprint=self._settings.tokenizer,
            )
        )
        return response

    def take(self, ids: list[int], generate: int) -> worker_pb2.StepResponse:
        """Tokens that the caller has chosen, then tokens that this worker chooses."""
        sequence = self._sequence
        sequence.take(ids)
        while generate and sequence.reason is None:
            ids.append(sequence.next())
            generate -= 1
        response = worker_pb2.StepResponse(position=sequence.position)
        response.tokens.extend(pb.Token(id=each, text=f"{each} ") for each in ids)
        if sequence.reason is not None:
            response.end.CopyFrom(sequence.end())
            return response
        return self._distribution(response)

    def _distribution(self, response: worker_pb2.StepResponse) -> worker_pb2.StepResponse:
        """A made-up one: halves from the true next token on."""
        following = Sequence(0, self._sequence.key, self._sequence.position, 2**62, 0, frozenset())
        first = following.next()
        for rank in range(min(self._first.candidates, VOCABULARY)):
            response.ids.append((first + rank) % VOCABULARY)
            response.logprobs.append(-math.log(2) * (rank + 1))
        return response


def scores(request: pb.ScoreRequest, settings: Settings) -> pb.ScoreResponse:
    """Made-up log-likelihoods, a function of the texts. Raises Refusal."""
    if not request.continuations:
        name = "continuations"
        raise Refusal(code_pb2.INVALID_ARGUMENT, f"{name}: is empty", field=name)
    counts = [max(1, each.ByteSize() // 4) for each in request.continuations]
    return pb.ScoreResponse(
        request_id=request.request_id,
        scores=[pb.Score(logprob=-0.5 * count, scored_tokens=count) for count in counts],
        worker=settings.name,
        model=settings.model,
    )


def status_of(refusal: Refusal) -> status_pb2.Status:
    """A refusal as a worker says it, with its details."""
    detail: Message
    if refusal.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(refusal.retry_after * 1e9))
        detail = error_details_pb2.RetryInfo(retry_delay=delay)
    elif refusal.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=refusal.field, description=refusal.message
        )
        detail = error_details_pb2.BadRequest(field_violations=[violation])
    else:
        detail = error_details_pb2.ErrorInfo(reason="stub", domain="conclave.v1")
    packed = AnyMessage()
    packed.Pack(detail)
    return status_pb2.Status(code=refusal.code, message=refusal.message, details=[packed])


async def abort(context: Any, refusal: Refusal) -> NoReturn:
    """End a call with a refusal."""
    trailing = ((DETAILS_KEY, status_of(refusal).SerializeToString()),)
    await context.abort(_CODES[refusal.code], refusal.message, trailing)
    raise AssertionError("abort returned")
