"""What a caller asks for, and the messages it becomes. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from google.protobuf import json_format

from ...protos import ensemble_pb2, gateway_pb2, generation_pb2
from ...protos.ensemble_pb2 import EnsembleSpec
from ...worker.errors import InvalidRequest, Violation
from ...worker.knobs import Knobs


class Sampling(TypedDict, total=False):
    """How to choose tokens; what is left out takes the checkpoint's own default.

    The fields are those of `SamplingParams` in protos/generation.proto, explained there.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    skip_special_tokens: bool
    logprobs: int
    prompt_logprobs: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; roles are system, developer, user, model (or assistant) and tool."""

    role: str
    content: str
    tool_calls_json: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt made of turns, rendered by the checkpoint's chat template."""

    messages: Sequence[Message]
    thinking: bool | None = None
    tools_json: Sequence[str] = ()
    add_generation_prompt: bool = True


Prompt = str | Sequence[int] | Chat
"""Text, token ids, or a chat."""


@dataclass(frozen=True, slots=True)
class Select:
    """Which workers may answer; all conditions hold at once."""

    names: Sequence[str] = ()
    model: str = ""
    labels: Mapping[str, str] | None = None


EnsembleForm = str | Mapping[str, object] | EnsembleSpec
"""A preset of the fleet file by its name, or a spec: a message, or a mapping of its fields."""


class Options(Sampling, total=False):
    """Everything that may be said about an ask beside its prompt."""

    messages: Sequence[Message]
    """The turns of a chat, instead of a prompt."""
    thinking: bool
    """Asks the model to think before it answers; with `messages`."""
    tools_json: Sequence[str]
    """Tool declarations, each a JSON object in the OpenAI form; with `messages`."""
    select: Select
    """Which workers may answer; any by default."""
    knobs: Knobs | Mapping[str, object]
    """The least that must be kept: `weight_bits` or more, `sparsity` and `max_error` or less."""
    timeout: float | None
    """Seconds until DeadlineExceeded; None waits for ever. Default: the client's."""
    request_id: str
    """Named in the worker's logs; made up by default."""
    ensemble: EnsembleForm
    """How several workers make the answer together; one worker by default."""
    priority: int
    """0 to 9; higher ones leave the gateway's queue first. Default 4."""
    session: str
    """Asks of one session go to the same worker while it has room."""
    resume: bool
    """Whether another worker goes on with the stream if its own dies. Default true."""


OWN_OPTIONS = Options.__annotations__.keys() - Sampling.__annotations__.keys()


class Envelope(TypedDict, total=False):
    """The fields of the messages that carry an ask to the gateway."""

    request: generation_pb2.GenerateRequest
    selector: ensemble_pb2.WorkerSelector | None
    handling: gateway_pb2.Handling | None
    ensemble: EnsembleSpec
    preset: str


def envelope(prompt: Prompt | None, options: Options) -> Envelope:
    """All that the gateway is told. Raises InvalidRequest if it cannot be made."""
    return {
        "request": generate_request(prompt, options),
        "selector": selector_message(options.get("select")),
        "handling": handling_message(options),
        **ensemble_form(options.get("ensemble")),
    }


def ensemble_form(ensemble: EnsembleForm | None) -> Envelope:
    """The ensemble for an envelope. Raises InvalidRequest if the mapping is no spec."""
    if ensemble is None:
        return {}
    if isinstance(ensemble, str):
        return {"preset": ensemble}
    if isinstance(ensemble, EnsembleSpec):
        return {"ensemble": ensemble}
    try:
        return {"ensemble": json_format.ParseDict(dict(ensemble), EnsembleSpec())}
    except json_format.ParseError as error:
        raise InvalidRequest.of("ensemble", str(error)) from error


def handling_message(options: Options) -> gateway_pb2.Handling | None:
    """How the gateway shall treat the ask; None if nothing was said."""
    priority, session = options.get("priority"), options.get("session", "")
    resume = options.get("resume")
    if priority is None and not session and resume is None:
        return None
    try:
        return gateway_pb2.Handling(priority=priority, session=session, resume=resume)
    except ValueError as error:
        raise InvalidRequest.of("handling.priority", str(error)) from error


def generate_request(prompt: Prompt | None, options: Options) -> generation_pb2.GenerateRequest:
    """The message for an ask. Raises InvalidRequest if it cannot be made."""
    return generation_pb2.GenerateRequest(
        request_id=options.get("request_id", ""),
        prompt=prompt_message(_one_prompt(prompt, options)),
        sampling=sampling_message(options),
        knobs=knobs_message(options.get("knobs")),
    )


def knobs_message(knobs: Knobs | Mapping[str, object] | None) -> generation_pb2.Knobs | None:
    """The message for what weights must be. Raises InvalidRequest with every knob at fault."""
    if knobs is None:
        return None
    given = knobs.model_dump() if isinstance(knobs, Knobs) else knobs
    checked = Knobs.checked(given)
    return generation_pb2.Knobs(
        sparsity=checked.sparsity, weight_bits=checked.weight_bits, max_error=checked.max_error
    )


def sampling_message(options: Options) -> generation_pb2.SamplingParams:
    """The message for the sampling fields among the options."""
    given = {k: v for k, v in options.items() if k not in OWN_OPTIONS and v is not None}
    unknown = sorted(given.keys() - Sampling.__annotations__.keys())
    if unknown:
        raise InvalidRequest([Violation(f"sampling.{name}", "is unknown") for name in unknown])
    message = generation_pb2.SamplingParams()
    for name, value in given.items():
        try:
            message.MergeFrom(generation_pb2.SamplingParams(**{name: value}))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InvalidRequest.of(f"sampling.{name}", str(error)) from error
    return message


def score_request(
    context: Prompt | None,
    continuations: Sequence[str | Sequence[int]],
    request_id: str,
    logprobs: int | None,
) -> generation_pb2.ScoreRequest:
    """The message for a score."""
    request = generation_pb2.ScoreRequest(request_id=request_id, logprobs=logprobs)
    if context is not None:
        request.context.CopyFrom(prompt_message(context))
    for continuation in continuations:
        if isinstance(continuation, str):
            request.continuations.add(text=continuation)
        else:
            request.continuations.add(token_ids=generation_pb2.TokenIds(ids=continuation))
    return request


def prompt_message(prompt: Prompt) -> generation_pb2.Prompt:
    """The message for a prompt in any of its three forms."""
    if isinstance(prompt, str):
        return generation_pb2.Prompt(text=prompt)
    if not isinstance(prompt, Chat):
        return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=prompt))
    messages = [
        generation_pb2.ChatMessage(
            role=message.role,
            content=message.content,
            tool_calls_json=message.tool_calls_json,
            name=message.name,
        )
        for message in prompt.messages
    ]
    chat = generation_pb2.Chat(
        messages=messages,
        thinking=prompt.thinking,
        tools_json=prompt.tools_json,
        add_generation_prompt=prompt.add_generation_prompt,
    )
    return generation_pb2.Prompt(chat=chat)


def selector_message(select: Select | None) -> ensemble_pb2.WorkerSelector | None:
    """The message for a choice of workers."""
    if select is None:
        return None
    return ensemble_pb2.WorkerSelector(
        names=select.names, model=select.model, labels=select.labels or {}
    )


def _one_prompt(prompt: Prompt | None, options: Options) -> Prompt:
    messages = options.get("messages")
    if (prompt is None) == (messages is None):
        raise InvalidRequest.of("prompt", "give a prompt or `messages`, not both")
    if messages is None:
        if "thinking" in options or "tools_json" in options:
            raise InvalidRequest.of("prompt", "`thinking` and `tools_json` need `messages`")
        assert prompt is not None
        return prompt
    return Chat(messages, options.get("thinking"), options.get("tools_json", ()))
