"""How fast is one request, end to end: client -> gateway -> Ray actor -> engine, on this machine?

Starts `conclave serve` with one CPU worker of the shipped model and measures, through gRPC:
the decode rate of one stream and of eight, what the gateway adds to a unary call (the same request
to the gateway and straight to the worker, in turn), and throughput at 1, 32 and 128 callers.
Client, gateway and worker share the machine's cores, as they do for a newcomer.
"""

import argparse
import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc
import yaml
from rich.console import Console
from rich.progress import track

from conclave.orchestrator.client import Client
from conclave.orchestrator.security.channels import WithMetadata, fleet_metadata
from conclave.protos import gateway_pb2, generation_pb2
from conclave.protos.gateway_pb2_grpc import GatewayServiceStub
from conclave.protos.worker_pb2_grpc import WorkerServiceStub

from .records import write_headline, write_result

MODEL = Path(__file__).parent.parent / "examples" / "models" / "debian-8m"
FLEET_SECRET = secrets.token_urlsafe(32)
"""Lets this script ask the worker past the gateway."""
PROMPT = "Package: libreoffice-writer\nLanguage: en\n\n"
STREAM_TOKENS = 200

console = Console(stderr=True)
Call = Callable[[], Awaitable[Any]]


def main() -> None:
    """Run all measurements and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the worker")
    parser.add_argument("--runs", type=int, default=7, help="runs of each decode measurement")
    parser.add_argument("--pairs", type=int, default=1500, help="pairs for the gateway's overhead")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a throughput run")
    parser.add_argument("--dry", action="store_true", help="print only; write no result")
    options = parser.parse_args()
    with running_fleet(options.threads) as (address, worker):
        figures = asyncio.run(measure(address, worker, options))
    report(figures)
    if not options.dry:
        save(figures)


@contextlib.contextmanager
def running_fleet(threads: int) -> Iterator[tuple[str, str]]:
    """A fleet of one worker in processes of its own; yields the gateway's and worker's address."""
    fleet = {
        "name": "benchmark",
        "gateway": {"port": 0},
        "workers": [
            {
                "name": "cpu",
                "engine": {
                    "model": str(MODEL),
                    "device": "cpu",
                    "threads": threads,
                    "max_sequences": 128,
                },
                "resources": {"num_cpus": 1, "num_gpus": 0},
            }
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.yaml"
        path.write_text(yaml.safe_dump(fleet))
        command = [sys.executable, "-m", "conclave.orchestrator.cli", "serve", "--fleet", str(path)]
        environment = {"COLUMNS": "400", "CONCLAVE_FLEET_SECRET": FLEET_SECRET}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        try:
            yield _addresses(process)
        finally:
            process.terminate()
            process.wait(30)


def _addresses(process: "subprocess.Popen[str]") -> tuple[str, str]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("gateway "):
            address = line.split()[1]
            break
    else:
        raise SystemExit("`conclave serve` ended before it listened; see its messages above")
    with console.status("starting the worker"), Client(address) as client:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            (worker,) = client.workers()
            if worker.state.name == "SERVING":
                return address, worker.address
            time.sleep(0.2)
    raise SystemExit("the worker did not come up within 120 s")


async def measure(gateway: str, worker: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, one after the other."""
    async with (
        grpc.aio.insecure_channel(gateway) as to_gateway,
        grpc.aio.insecure_channel(worker) as to_worker,
    ):
        line: Any = WithMetadata(to_worker, fleet_metadata(FLEET_SECRET))
        front, back = GatewayServiceStub(to_gateway), WorkerServiceStub(line)
        await check(front, back)
        figures: dict[str, Any] = {"threads": options.threads}
        for count in (1, 8):
            rates = [
                await decode_rate(front, count)
                for _ in track(range(options.runs), f"decode, {count} streams", console=console)
            ]
            figures[f"decode_{count}"] = summary(rates)
        figures["overhead_ms"] = await overhead(front, back, options.pairs)
        figures["throughput"] = [
            await throughput(front, back, callers, options.seconds)
            for callers in track((1, 32, 128), "throughput", console=console)
        ]
    return figures


def request(tokens: int, seed: int = 0, whole: bool = True) -> generation_pb2.GenerateRequest:
    """A greedy request that always makes `tokens` tokens; `seed` makes its prompt its own."""
    return generation_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text=f"{seed} {PROMPT}"),
        sampling=generation_pb2.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
        whole=whole,
    )


async def check(front: Any, back: Any) -> None:
    """No figure unless gateway and worker say the same."""
    answer = await front.Complete(gateway_pb2.CompleteRequest(request=request(16)))
    direct = await back.Complete(request(16))
    assert [t.id for t in answer.outputs[0].tokens] == [t.id for t in direct.outputs[0].tokens]
    assert answer.usage.completion_tokens == 16


async def decode_rate(front: Any, streams: int) -> float:
    """Tokens a second over all streams, from the first request to the last event."""

    async def stream(seed: int) -> int:
        tokens = 0
        asked = gateway_pb2.GatewayGenerateRequest(request=request(STREAM_TOKENS, seed, False))
        async for event in front.Generate(asked):
            tokens += len(event.delta.tokens)
        return tokens

    started = time.perf_counter()
    tokens = await asyncio.gather(*(stream(seed) for seed in range(streams)))
    assert sum(tokens) == streams * STREAM_TOKENS
    return sum(tokens) / (time.perf_counter() - started)


async def overhead(front: Any, back: Any, pairs: int) -> dict[str, float]:
    """What the gateway adds to one unary call with one caller, in ms.

    The two paths are asked in turn with the same request, so that a machine that drifts drifts for
    both; the figure is the difference of the medians. The request is as short as one can be, one
    token in and one out, because the model's own time is noise here.
    """
    short = request(1)
    short.prompt.CopyFrom(generation_pb2.Prompt(token_ids={"ids": [2]}))
    asked = gateway_pb2.CompleteRequest(request=short)
    through: list[float] = []
    direct: list[float] = []
    for index in track(range(-50, pairs), "gateway overhead", console=console):
        turn = [
            (through, lambda: front.Complete(asked)),
            (direct, lambda: back.Complete(short)),
        ]
        for times, call in turn if index % 2 else reversed(turn):
            started = time.perf_counter()
            await call()
            if index >= 0:
                times.append((time.perf_counter() - started) * 1e3)
    parts = [
        median(through[start::5]) - median(direct[start::5]) for start in range(5)
    ]  # five interleaved fifths, for a spread
    return {
        "gateway_p50": median(through),
        "direct_p50": median(direct),
        "gateway_p99": quantiles(through, n=100)[-1],
        "direct_p99": quantiles(direct, n=100)[-1],
        "p50": median(through) - median(direct),
        "low": min(parts),
        "high": max(parts),
    }


async def throughput(front: Any, back: Any, callers: int, seconds: float) -> dict[str, float]:
    """Requests a second of 8 tokens each, through the gateway and straight to the worker."""
    asked = gateway_pb2.CompleteRequest(request=request(8))
    through = await _load(lambda: front.Complete(asked), callers, seconds)
    direct = await _load(lambda: back.Complete(request(8)), callers, seconds)
    return {
        "callers": callers,
        **{f"gateway_{key}": value for key, value in through.items()},
        **{f"direct_{key}": value for key, value in direct.items()},
    }


async def _load(call: Call, callers: int, seconds: float) -> dict[str, float]:
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def caller() -> None:
        while (started := time.perf_counter()) < end:
            await call()
            times.append((time.perf_counter() - started) * 1e3)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return {
        "requests_per_second": len(times) / (time.perf_counter() - started),
        "p50_ms": median(times),
        "p99_ms": quantiles(times, n=100)[-1],
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def report(figures: dict[str, Any]) -> None:
    """Say the figures in words."""
    one, eight, cost = figures["decode_1"], figures["decode_8"], figures["overhead_ms"]
    print(f"decode, one stream     {one['median']:8.1f} tokens/s")
    print(f"decode, eight streams  {eight['median']:8.1f} tokens/s in total")
    print(f"gateway adds           {cost['p50']:8.3f} ms to a unary call (p50, one caller)")
    for row in figures["throughput"]:
        print(
            f"{row['callers']:4d} callers  {row['gateway_requests_per_second']:8.1f} requests/s "
            f"(direct {row['direct_requests_per_second']:.1f}), p50 {row['gateway_p50_ms']:.1f} ms"
        )


def save(figures: dict[str, Any]) -> None:
    """Write the result and the headline figures that this script owns."""
    print(f"written: {write_result('serving', figures)}")
    one, cost = figures["decode_1"], figures["overhead_ms"]
    write_headline("cpu_decode_rate", one["median"], "tokens/s", (one["low"], one["high"]))
    write_headline("gateway_overhead_p50", cost["p50"], "ms", (cost["low"], cost["high"]))


if __name__ == "__main__":
    main()
