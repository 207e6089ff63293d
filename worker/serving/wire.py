"""Between protobuf messages and the engine's values; between errors and gRPC statuses. No I/O."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from ...protos import generation_pb2 as pb
from ...protos import worker_pb2
from ..errors import (
    Cancelled,
    ConclaveError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from ..knobs import Knobs
from ..load import Load
from ..precision import Precision
from ..requests import events
from ..requests.completion import Completion, Score
from ..requests.intake import Intake
from ..scheduling.sequence import FinishReason

DETAILS_KEY = "grpc-status-details-bin"

_CODES: dict[type[ConclaveError], int] = {
    InvalidRequest: code_pb2.INVALID_ARGUMENT,
    Overloaded: code_pb2.RESOURCE_EXHAUSTED,
    Unavailable: code_pb2.UNAVAILABLE,
    Unauthenticated: code_pb2.UNAUTHENTICATED,
    DeadlineExceeded: code_pb2.DEADLINE_EXCEEDED,
    Cancelled: code_pb2.CANCELLED,
}
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_ROLES = ("system", "developer", "user", "model", "assistant", "tool")


def prompt_ids(intake: Intake, prompt: pb.Prompt, field: str = "prompt") -> list[int]:
    """Token ids of a prompt message.

    Raises:
        InvalidRequest: no form is given, or the one given is broken.
    """
    form = prompt.WhichOneof("input")
    if form == "text":
        return intake.encode(prompt.text)
    if form == "token_ids":
        return intake.encode(list(prompt.token_ids.ids))
    if form == "chat":
        return _chat_ids(intake, prompt.chat, field)
    raise InvalidRequest.of(field, "is missing; set text, token_ids or chat")


def continuation_ids(intake: Intake, continuation: pb.Continuation, field: str) -> list[int]:
    """Token ids of a continuation; no special tokens are added."""
    form = continuation.WhichOneof("input")
    if form == "text":
        return intake.tokenizer.encode(continuation.text, special=False)
    if form == "token_ids":
        return intake.encode(list(continuation.token_ids.ids))
    raise InvalidRequest.of(field, "is missing; set text or token_ids")


def sampling_fields(sampling: pb.SamplingParams) -> dict[str, object]:
    """The fields that the caller has set."""
    fields: dict[str, object] = {}
    for descriptor, value in sampling.ListFields():
        if isinstance(value, int | float | str):
            fields[descriptor.name] = value
        else:
            fields[descriptor.name] = dict(value) if hasattr(value, "items") else tuple(value)
    return fields


def knobs(message: pb.GenerateRequest) -> Knobs:
    """The least that the weights must be. Raises InvalidRequest."""
    return Knobs.checked({field.name: value for field, value in message.knobs.ListFields()})


def precision(found: Precision) -> pb.Precision:
    """What is left of the weights, as a message."""
    return pb.Precision(**asdict(found))


def made(message: pb.GenerateRequest) -> tuple[events.Made, ...]:
    """What the outputs have already."""
    return tuple(events.Made(tuple(each.ids), each.ended) for each in message.made)


def response(
    request_id: str,
    event: events.Delta | events.Finished | events.Failed,
    worker: str,
    model: str,
) -> pb.GenerateResponse:
    """One event as a message."""
    message = pb.GenerateResponse(request_id=request_id)
    if isinstance(event, events.Delta):
        message.delta.output_index = event.output_index
        message.delta.tokens.extend(map(token, event.tokens))
        message.delta.prompt_tokens.extend(map(token, event.prompt_tokens))
    elif isinstance(event, events.Finished):
        message.finished.CopyFrom(_finished(event, worker, model))
    else:
        message.failed.error.CopyFrom(_error(event.error))
    return message


def completion(request_id: str, whole: Completion, worker: str, model: str) -> pb.CompleteResponse:
    """All answers of a request as one message."""
    end = _finished(whole.finished, worker, model)
    return pb.CompleteResponse(
        request_id=request_id,
        outputs=[
            pb.Output(text=output.text, tokens=map(token, output.tokens), end=last)
            for output, last in zip(whole.outputs, end.outputs, strict=True)
        ],
        usage=end.usage,
        timings=end.timings,
        worker=worker,
        model=model,
        prompt_tokens=map(token, whole.prompt_tokens),
    )


def token(record: events.TokenRecord) -> pb.Token:
    """One token record as a message."""
    message = pb.Token(id=record.id, text=record.text)
    if record.logprob is not None:
        message.logprob = record.logprob
        message.rank = record.rank or 0
        message.candidates.extend(
            pb.Candidate(id=c.id, text=c.text, logprob=c.logprob) for c in record.candidates
        )
    return message


def score(result: Score, with_tokens: bool) -> pb.Score:
    """One score as a message."""
    tokens = map(token, result.tokens) if with_tokens else ()
    return pb.Score(logprob=result.logprob, scored_tokens=result.scored_tokens, tokens=tokens)


def status(error: ConclaveError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Code, message and trailing metadata (google.rpc details) of an error."""
    code = _code(error)
    rich = status_pb2.Status(code=code, message=str(error), details=_details(error))
    trailing = ((DETAILS_KEY, rich.SerializeToString()),)
    return _STATUS_CODES[code], str(error), trailing


def _chat_ids(intake: Intake, chat: pb.Chat, field: str) -> list[int]:
    if not chat.messages:
        raise InvalidRequest.of(f"{field}.chat.messages", "is empty; give at least one message")
    messages = [
        _message(message, f"{field}.chat.messages[{index}]")
        for index, message in enumerate(chat.messages)
    ]
    tools = [
        _json(tool, f"{field}.chat.tools_json[{index}]", dict)
        for index, tool in enumerate(chat.tools_json)
    ]
    opened = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return intake.encode(
        messages, thinking=chat.thinking, tools=tools, add_generation_prompt=opened
    )


def _message(message: pb.ChatMessage, field: str) -> Mapping[str, object]:
    if message.role not in _ROLES:
        raise InvalidRequest.of(f"{field}.role", f"{message.role!r} is none of {', '.join(_ROLES)}")
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    if message.HasField("name"):
        turn["name"] = message.name
    if message.HasField("tool_calls_json"):
        turn["tool_calls"] = _json(message.tool_calls_json, f"{field}.tool_calls_json", list)
    return turn


def _json(text: str, field: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequest.of(field, f"is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "array"
        raise InvalidRequest.of(field, f"must be a JSON {wanted}")
    return value


def _finished(event: events.Finished, worker: str, model: str) -> pb.Finished:
    timings = event.timings
    return pb.Finished(
        outputs=map(output_end, event.outputs),
        usage=usage(event.usage),
        timings=pb.Timings(
            queued=timings.queued, first_token=timings.first_token, total=timings.total
        ),
        worker=worker,
        model=model,
    )


def usage(spent: events.Usage) -> pb.Usage:
    """Tokens of a request as a message."""
    return pb.Usage(
        prompt_tokens=spent.prompt_tokens,
        cached_tokens=spent.cached_tokens,
        completion_tokens=spent.completion_tokens,
        preemptions=spent.preemptions,
    )


def load(state: Load, step_age: float, draining: bool) -> worker_pb2.GetLoadResponse:
    """How busy an engine is, as a message."""
    stream, experts = state.stream, state.experts
    return worker_pb2.GetLoadResponse(
        running_sequences=state.running,
        waiting_sequences=state.waiting,
        outstanding_tokens=state.outstanding_tokens,
        pools=[
            worker_pb2.BlockPool(
                window=pool.window or 0,
                blocks=pool.blocks,
                used=pool.used,
                cached=pool.cached,
                narrow=None if narrow is None else worker_pb2.NarrowPool(**asdict(narrow)),
                host=None if host is None else worker_pb2.HostPool(**asdict(host)),
            )
            for pool, narrow, host in zip_longest(state.pools, state.narrow, state.host)
        ],
        prompt_tokens=state.prompt_tokens,
        cached_tokens=state.cached_tokens,
        completion_tokens=state.completion_tokens,
        preemptions=state.preemptions,
        steps=state.steps,
        tokens_per_second=state.tokens_per_second,
        draining=draining,
        step_age_seconds=step_age,
        streaming=None if stream is None else worker_pb2.Streaming(**asdict(stream)),
        experts=None if experts is None else worker_pb2.Experts(**asdict(experts)),
    )


def output_end(end: events.OutputEnd) -> pb.OutputEnd:
    """One output's end as a message."""
    message = pb.OutputEnd(
        output_index=end.output_index,
        reason=_REASONS[end.reason],
        completion_tokens=end.completion_tokens,
    )
    if isinstance(end.matched, int):
        message.stop_token_id = end.matched
    elif end.matched is not None:
        message.stop_text = end.matched
    return message


def _error(error: ConclaveError) -> pb.Error:
    message = pb.Error(
        code=_code(error),
        message=str(error),
        retryable=isinstance(error, Overloaded | Unavailable),
    )
    if isinstance(error, Overloaded):
        message.retry_after_seconds = error.retry_after
    return message


def _code(error: ConclaveError) -> int:
    return _CODES.get(type(error), int(code_pb2.INTERNAL))


def _details(error: ConclaveError) -> Iterable[any_pb2.Any]:
    if isinstance(error, InvalidRequest):
        yield _pack(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field, description=violation.description
                    )
                    for violation in error.violations
                ]
            )
        )
    if isinstance(error, Overloaded):
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after * 1000))
        yield _pack(error_details_pb2.RetryInfo(retry_delay=delay))


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
