"""Nonsense for a gateway or a worker, and which answers to it are proper.

Two kinds, half each: messages with wild fields, made by hypothesis from the descriptors, and plain
bytes. A proper answer is an answer, or one of the statuses that name the caller's mistake. INTERNAL
and UNKNOWN are not, but for bytes that are no message at all: to those grpc itself answers, with
INTERNAL or UNKNOWN, before any code of ours sees them; they are counted as `unparsed`.
"""

import asyncio
import contextlib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

from conclave.protos import gateway_pb2, worker_pb2

SECONDS = 2.0
WIDTH = 32
PROPER = frozenset(
    {
        "OK",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "ABORTED",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "CANCELLED",
    }
)
OF_GRPC = frozenset({"INTERNAL", "UNKNOWN"})
OUR_END = "Internal error from Core"
"""What grpc's own client says if the server has ended a call before we had sent our message."""
MOST_TOKENS = 8
"""A request that is right by chance shall not keep a worker busy."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service."""

    path: str
    takes: type[Message]
    gives: type[Message]
    takes_stream: bool
    gives_stream: bool


@dataclass(slots=True)
class Outcome:
    """What came of the nonsense."""

    sent: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """Method and answer of each one that is not proper."""


def methods(module: Any, service: str, leave: Sequence[str] = ()) -> list[Method]:
    """The methods of a service but those in `leave`."""
    descriptor = module.DESCRIPTOR.services_by_name[service]
    found = []
    for each in descriptor.methods:
        if each.name not in leave:
            found.append(
                Method(
                    f"/{descriptor.full_name}/{each.name}",
                    each.input_type._concrete_class,
                    each.output_type._concrete_class,
                    each.client_streaming,
                    each.server_streaming,
                )
            )
    return found


GATEWAY = methods(gateway_pb2, "GatewayService")
# A drain is not nonsense: a worker obeys it.
WORKER = methods(worker_pb2, "WorkerService", leave=("Drain",))


async def fuzz(address: str, count: int, seed: int, targets: Sequence[Method]) -> Outcome:
    """Sends so many messages, some at a time."""
    outcome = Outcome()
    pending = iter(nonsense(targets, count, seed))
    async with grpc.aio.insecure_channel(address) as channel:

        async def sender() -> None:
            for method, payload in pending:
                await _send(channel, method, payload, outcome)

        await asyncio.gather(*(sender() for _ in range(WIDTH)))
    return outcome


def nonsense(targets: Sequence[Method], count: int, seed: int) -> Iterator[tuple[Method, bytes]]:
    """Wild messages and raw bytes, in turn."""
    draw = random.Random(seed)
    wild = {method: wild_messages(method.takes, 50, seed) for method in targets}
    for index in range(count):
        method = draw.choice(targets)
        base = draw.choice(wild[method])
        yield method, base if index % 2 else garble(draw, base)


def garble(draw: random.Random, base: bytes) -> bytes:
    """Bytes that may be anything: random ones, or a message with some of it broken."""
    kind = draw.randrange(4)
    if kind == 0 or not base:
        return draw.randbytes(draw.randrange(200))
    broken = bytearray(base)
    if kind == 1:
        return bytes(broken[: draw.randrange(len(broken))])
    for _ in range(draw.randint(1, 8)):
        broken[draw.randrange(len(broken))] = draw.randrange(256)
    if kind == 2:
        return bytes(broken)
    return bytes(broken) + draw.randbytes(draw.randrange(50))


def wild_messages(kind: type[Message], count: int, seed: int) -> list[bytes]:
    """Serialized messages of a type, as wild as hypothesis makes them."""
    made: list[bytes] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(messages(kind))
    def collect(message: Message) -> None:
        made.append(message.SerializeToString())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)
        collect()
    return made


def messages(kind: type[Message], depth: int = 4) -> st.SearchStrategy[Message]:
    """Any message of a type: each field there or not, with values from the edges of its type."""
    fields = {
        each.name: _field(each, depth)
        for each in kind.DESCRIPTOR.fields
        if depth or each.message_type is None
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


_NUMBERS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from((0, 1, -1, 14, 2**31 - 1, -(2**31))),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from((0, 1, -1, 2**63 - 1, -(2**63))),
    FieldDescriptor.CPPTYPE_UINT32: st.sampled_from((0, 1, 2, 3, 17, 500, 100_000, 2**32 - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.sampled_from((0, 1, 2, 2**63, 2**64 - 1)),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.sampled_from((0, 1, 2, 99)),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
}
_TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(("", "\0", "a" * 10_000, "{", "[1]", "(", "(a+)+$", "{prompt}{drafts}{x}")),
)


def _field(descriptor: Any, depth: int) -> st.SearchStrategy[Any]:
    if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
        parts = descriptor.message_type.fields_by_name
        return st.dictionaries(_single(parts["key"], 0), _single(parts["value"], 0), max_size=3)
    single = _single(descriptor, depth)
    return st.lists(single, max_size=3) if descriptor.is_repeated else single


def _single(descriptor: Any, depth: int) -> st.SearchStrategy[Any]:
    if descriptor.message_type is not None:
        return messages(descriptor.message_type._concrete_class, depth - 1)
    if descriptor.name == "max_tokens":
        return st.sampled_from((0, 1, MOST_TOKENS, 2**32 - 1))
    if descriptor.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if descriptor.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=20)
        return _TEXTS
    return _NUMBERS[descriptor.cpp_type]


async def _send(channel: Any, method: Method, payload: bytes, outcome: Outcome) -> None:
    """Sends one payload and notes the answer."""
    outcome.sent += 1
    code, message = await _answer(channel, method, payload)
    if code in OF_GRPC and not _parses(method.takes, payload):
        outcome.codes["unparsed"] += 1
        return
    if message == OUR_END:
        outcome.codes["ended early"] += 1
        return
    outcome.codes[code] += 1
    if code not in PROPER or "Traceback" in message:
        outcome.wrong.append((method.path, f"{code} {message} for {payload[:300]!r}"))


async def _answer(channel: Any, method: Method, payload: bytes) -> tuple[str, str]:
    kinds: dict[tuple[bool, bool], Callable[..., Any]] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    make = kinds[method.takes_stream, method.gives_stream]
    call = make(method.path, lambda each: each, method.gives.FromString)
    if method.takes_stream:
        sent = call(timeout=SECONDS)
        # The server may have ended the call already; its status is what counts.
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await sent.write(payload)
            await sent.done_writing()
    else:
        sent = call(payload, timeout=SECONDS)
    if method.gives_stream:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await sent.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
                pass
    return (await sent.code()).name, await sent.details() or ""


def _parses(kind: type[Message], payload: bytes) -> bool:
    try:
        kind.FromString(payload)
    except DecodeError:
        return False
    return True
