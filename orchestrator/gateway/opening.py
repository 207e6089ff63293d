"""From a caller's message to an `Ask`: checks what is the gateway's own to check."""

import itertools
import random
import secrets
from array import array
from collections.abc import Callable
from dataclasses import replace

from ...protos import ensemble_pb2, gateway_pb2
from ...protos.generation_pb2 import GenerateRequest, Prompt, ScoreRequest
from ...worker.errors import InvalidRequest
from ...worker.knobs import Knobs
from ..routing.prefix import BLOCK_BYTES
from ..routing.router import ANY, Selector, Wish
from .admission import DEFAULT_PRIORITY, Ask

HIGHEST_PRIORITY = 9
USUAL_ANSWER_TOKENS = 256
"""What an answer without max_tokens is taken to need."""
BYTES_PER_TOKEN = 4

_process = secrets.token_hex(6)
_numbers = itertools.count(1)

Enveloped = (
    gateway_pb2.GatewayGenerateRequest
    | gateway_pb2.CompleteRequest
    | gateway_pb2.GatewayScoreRequest
)


def open_ask(envelope: Enveloped, remaining: Callable[[], float | None]) -> Ask:
    """The ask in an envelope; its request gets an id if it has none.

    Args:
        remaining: seconds until the deadline.

    Raises:
        InvalidRequest: the request is missing, or the priority or a knob unknown.
    """
    if not envelope.HasField("request"):
        raise InvalidRequest.of("request", "is missing")
    request = envelope.request
    if not request.request_id:
        request.request_id = f"{_process}-{next(_numbers)}"
    selector = selector_of(envelope.selector) if envelope.HasField("selector") else ANY
    if isinstance(request, GenerateRequest) and request.HasField("knobs"):
        selector = replace(selector, knobs=_knobs_of(request))
    ask = size(request, Ask(Wish(selector, draw=random.random()), remaining))
    if envelope.HasField("handling"):
        _handle(ask, envelope.handling)
    return ask


def size(request: GenerateRequest | ScoreRequest, ask: Ask) -> Ask:
    """Tell the ask how much work its request is."""
    ask.wish.tokens = request.ByteSize() // BYTES_PER_TOKEN
    if isinstance(request, GenerateRequest):
        sampling = request.sampling
        ask.sequences = max(1, min(sampling.n, 64))
        longest = sampling.max_tokens if sampling.HasField("max_tokens") else USUAL_ANSWER_TOKENS
        ask.answer_tokens = longest * ask.sequences
        ask.wish.tokens += ask.answer_tokens
        ask.prompt = _beginning(request.prompt)
    return ask


def most_prompt_tokens(prompt: Prompt) -> int:
    """No tokenizer makes more of the prompt, special tokens and template included."""
    if prompt.WhichOneof("input") == "token_ids":
        return len(prompt.token_ids.ids)
    return prompt.ByteSize() + 16


def selector_of(message: ensemble_pb2.WorkerSelector) -> Selector:
    """A selector from its message."""
    return Selector(frozenset(message.names), message.model, dict(message.labels))


def _knobs_of(request: GenerateRequest) -> Knobs:
    return Knobs.checked({field.name: value for field, value in request.knobs.ListFields()})


def _handle(ask: Ask, handling: gateway_pb2.Handling) -> None:
    if handling.priority > HIGHEST_PRIORITY:
        raise InvalidRequest.of("handling.priority", f"must be 0 to {HIGHEST_PRIORITY}")
    ask.priority = handling.priority if handling.HasField("priority") else DEFAULT_PRIORITY
    ask.session = handling.session
    ask.resume = handling.resume if handling.HasField("resume") else True


def _beginning(prompt: Prompt) -> bytes:
    """What prefix affinity goes by: the prompt without anything that counts its length."""
    match prompt.WhichOneof("input"):
        case "text":
            text = prompt.text if len(prompt.text) >= BLOCK_BYTES // 4 else ""
        case "token_ids":
            return array("I", prompt.token_ids.ids).tobytes()
        case _:
            text = "".join(turn.role + "\n" + turn.content + "\n" for turn in prompt.chat.messages)
    data = text.encode()
    return data if len(data) >= BLOCK_BYTES else b""
