"""How much goes through one gateway process, and what does it add?

Stub workers, the gateway and the load generator are processes of their own on this machine's cores.
A stub's step gives each running sequence one token, as a real engine's does, so one event carries
one token unless said otherwise: that is the worst case for a gateway, and the headline. Then the
same with several tokens an event. Every stream's tokens are counted, and compared with the truth
for one stream in sixteen. Added latency is gateway minus direct, asked in turn.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import grpc
import grpc.aio
import uvloop

from conclave.protos import gateway_pb2, gateway_pb2_grpc, worker_pb2_grpc
from conclave.protos import generation_pb2 as pb

from .processes import Child, introduce, start_gateway, start_worker
from .records import write_headline, write_result
from .stub_machine import WEIGHTS, truth

WORKERS = 2
SLOTS = 512
STREAMS = (1, 32, 128, 512)
LIMIT_STREAMS = 128
"""Times the streams' rate a little over the goal: what a fleet of this size would want."""
CHECKED = 16
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Rig:
    """A gateway and its workers."""

    gateway: Child
    workers: list[Child]
    front: Any
    backs: list[Any]

    async def settle(self, **settings: Any) -> None:
        """Gives every worker other settings."""
        await asyncio.gather(*(worker.tell(**settings) for worker in self.workers))


async def started(stack: AsyncExitStack) -> Rig:
    """A rig whose workers all serve; it ends with the stack."""
    gateway = await start_gateway()
    stack.push_async_callback(gateway.stop)
    workers = []
    for index in range(WORKERS):
        worker = await start_worker(f"w{index}", slots=SLOTS, rate=1e6)
        stack.push_async_callback(worker.stop)
        await introduce(gateway, f"w{index}", worker)
        workers.append(worker)
    channels = [
        await stack.enter_async_context(grpc.aio.insecure_channel(each.address))
        for each in (gateway, *workers)
    ]
    front: Any = gateway_pb2_grpc.GatewayServiceStub(channels[0])
    backs: list[Any] = [worker_pb2_grpc.WorkerServiceStub(each) for each in channels[1:]]
    while (await front.GetFleet(gateway_pb2.GetFleetRequest())).serving_workers < WORKERS:
        await asyncio.sleep(0.05)
    return Rig(gateway, workers, front, backs)


def request(number: int, tokens: int, whole: bool = False) -> pb.GenerateRequest:
    """A greedy request with a prompt of its own."""
    return pb.GenerateRequest(
        request_id=str(number),
        prompt=pb.Prompt(text=f"prompt {number}"),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
        whole=whole,
    )


@dataclass
class Flow:
    """What one measurement of streams has counted."""

    tokens: int = 0
    events: int = 0
    first: list[float] = field(default_factory=list)
    """Seconds to each stream's first event."""


async def stream(call: Any, asked: pb.GenerateRequest, flow: Flow) -> None:
    """Reads one stream to its end, counts, and checks."""
    began = time.perf_counter()
    check = int(asked.request_id) % CHECKED == 0
    ids: list[int] = []
    count = 0
    while (event := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        tokens = event.delta.tokens
        if not count:
            flow.first.append(time.perf_counter() - began)
        count += len(tokens)
        flow.events += 1
        if check:
            ids += [token.id for token in tokens]
        if event.HasField("failed"):
            raise SystemExit(f"a stream failed: {event.failed.error}")
    flow.tokens += count
    assert count == asked.sampling.max_tokens, f"{count} tokens came"
    assert not check or ids == truth(asked, 0, WEIGHTS)


async def flood(
    rig: Rig, streams: int, rate: float, per_step: int, seconds: float
) -> dict[str, Any]:
    """That many streams at once, each at `rate` tokens a second if everything keeps up."""
    await rig.settle(stream_rate=rate, per_step=per_step)
    tokens = max(per_step, round(rate * seconds))
    flow, used = Flow(), cpu_seconds(rig)
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            asked = request(number, tokens)
            envelope = gateway_pb2.GatewayGenerateRequest(request=asked)
            group.create_task(stream(rig.front.Generate(envelope), asked, flow))
    took = time.perf_counter() - began
    return {
        "streams": streams,
        "offered_tokens_per_second": streams * rate,
        "tokens_per_second": flow.tokens / took,
        "events_per_second": flow.events / took,
        "tokens_per_event": flow.tokens / flow.events,
        "first_event_p50_ms": median(flow.first) * 1e3,
        "seconds": took,
        **shares(used, cpu_seconds(rig), took),
    }


def cpu_seconds(rig: Rig) -> dict[str, float]:
    """Processor time of every party since its start."""
    return {
        "gateway": _cpu(rig.gateway.pid),
        "stubs": sum(_cpu(worker.pid) for worker in rig.workers),
        "load": time.process_time(),
    }


def shares(before: dict[str, float], after: dict[str, float], took: float) -> dict[str, float]:
    """Cores that every party has used."""
    return {f"{name}_cores": (after[name] - before[name]) / took for name in before}


def _cpu(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        parts = file.read().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / TICKS


async def latency(rig: Rig, callers: int, pairs: int, kind: str) -> dict[str, Any]:
    """What the gateway adds to one unary call, or to a stream's first event, in ms."""
    await rig.settle(stream_rate=1e5, per_step=1)
    ways: dict[str, list[float]] = {"through": [], "direct": []}
    for turn in range(6):
        way = ("through", "direct")[turn % 2]
        await _callers(rig, callers, max(4, pairs // (3 * callers)), kind, way, ways[way])
    row: dict[str, Any] = {"callers": callers, "kind": kind}
    for way, times in ways.items():
        row[f"{way}_p50_ms"] = median(times)
        row[f"{way}_p99_ms"] = quantiles(times, n=100)[-1]
    row["added_p50_ms"] = row["through_p50_ms"] - row["direct_p50_ms"]
    row["added_p99_ms"] = row["through_p99_ms"] - row["direct_p99_ms"]
    return row


async def _callers(
    rig: Rig, callers: int, calls: int, kind: str, way: str, times: list[float]
) -> None:
    """Every caller asks again and again; a warm first round is not counted."""

    async def caller(number: int) -> None:
        back = rig.backs[number % len(rig.backs)]
        call = _unary(rig, back, way) if kind == "unary" else _first_event(rig, back, way)
        for index in range(calls + 2):
            began = time.perf_counter()
            await call()
            if index >= 2:
                times.append((time.perf_counter() - began) * 1e3)

    await asyncio.gather(*(caller(number) for number in range(callers)))


def _unary(rig: Rig, back: Any, way: str) -> Callable[[], Awaitable[Any]]:
    asked = request(0, 1, whole=True)
    envelope = gateway_pb2.CompleteRequest(request=asked)
    if way == "through":
        return lambda: rig.front.Complete(envelope)
    return lambda: back.Complete(asked)


def _first_event(rig: Rig, back: Any, way: str) -> Callable[[], Awaitable[Any]]:
    asked = request(0, 1)
    envelope = gateway_pb2.GatewayGenerateRequest(request=asked)

    async def call() -> None:
        stream = rig.front.Generate(envelope) if way == "through" else back.Generate(asked)
        assert (await stream.read()).HasField("delta")
        # The rest is not part of the time to the first event, but must not pile up.
        stream.cancel()

    return call


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, one after the other."""
    async with AsyncExitStack() as stack:
        rig = await started(stack)
        await flood(rig, 8, 50.0, 1, 0.5)  # warm
        single = [
            await flood(rig, streams, options.rate, 1, options.seconds) for streams in STREAMS
        ]
        limit = [
            await flood(rig, LIMIT_STREAMS, options.rate, 1, options.seconds)
            for _ in range(options.runs)
        ]
        several = [
            await flood(rig, LIMIT_STREAMS, options.rate, per_step, options.seconds)
            for per_step in (4, 8, 16)
        ]
        added = [
            await latency(rig, callers, options.pairs, kind)
            for kind in ("unary", "first event")
            for callers in (1, 32, 128)
        ]
    return {
        "one_token_an_event": single,
        "limit": limit,
        "several_tokens_an_event": several,
        "latency": added,
    }


def report(figures: dict[str, Any]) -> None:
    """Say the figures in words."""
    kinds = ("one_token_an_event", "limit", "several_tokens_an_event")
    for row in (row for kind in kinds for row in figures[kind]):
        print(
            f"{row['streams']:4d} streams  {row['tokens_per_second']:9.0f} tokens/s of "
            f"{row['offered_tokens_per_second']:.0f} offered  {row['events_per_second']:8.0f} "
            f"events/s ({row['tokens_per_event']:.2f} tokens each)  cores: "
            f"gateway {row['gateway_cores']:.2f}, stubs {row['stubs_cores']:.2f}, "
            f"load {row['load_cores']:.2f}"
        )
    for row in figures["latency"]:
        print(
            f"{row['callers']:4d} callers  {row['kind']:12} +{row['added_p50_ms']:.2f} ms p50, "
            f"+{row['added_p99_ms']:.2f} ms p99 (direct {row['direct_p50_ms']:.2f})"
        )


def main() -> None:
    """Run all measurements and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a stream")
    parser.add_argument("--rate", type=float, default=200.0, help="tokens/s of one stream")
    parser.add_argument("--pairs", type=int, default=1500, help="calls for each latency")
    parser.add_argument("--runs", type=int, default=3, help="runs for the limit")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(measure(options))
    report(figures)
    if not options.dry:
        save(figures)


def save(figures: dict[str, Any]) -> None:
    """Write the result and the headline figure, which is the worst case: one token an event."""
    print(f"written: {write_result('gateway', figures)}")
    rates = [row["tokens_per_second"] for row in figures["limit"]]
    write_headline("gateway_stream_rate", median(rates), "tokens/s", (min(rates), max(rates)))


if __name__ == "__main__":
    main()
