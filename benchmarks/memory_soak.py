"""Does an engine that has too little memory keep to what it has, for as long as it runs?

Two engines at once, each with less memory than its model needs: one streams whole layers, the
other single experts. Both keep blocks of the cache on the host. Callers ask for the same prompts
again and again, whose answers must stay the same, and for others that they give up midway, while
faults come: a step fails, and memory is short, on a GPU because another process takes what is free.
Each second the process tells what it has: resident, locked, reserved on the device. Judged is what
it has at the end against an early stretch. On a GPU layers are in bfloat16, kept coded; there a
step's size decides which kernel multiplies, so an answer beside others may be another: those are
counted, and judged are answers alone, before and after. Given up: models larger than these.

Run it as `python -m benchmarks.memory_soak`; ten minutes, on a GPU if there is one.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import Progress

from conclave.worker import Engine, Knobs
from conclave.worker.compress.interchange.exporter import export_checkpoint
from conclave.worker.errors import ConclaveError, ConfigError, Overloaded, Unavailable

from .records import write_result

MODELS = Path(__file__).parents[1] / "examples" / "models"
CALLERS = 3
"""Of each engine."""
PROBES = 6
ROOMS = (1.05, 1.1, 1.15, 1.2, 1.25, 1.3)
"""Times the least budget that an engine takes: the first with which it streams as it shall."""
EVERY = 4.0
"""Seconds between faults."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"layers": "bfloat16" if DEVICE == "cuda" else "float32", "experts": "float32"}
"""Of the engines."""
SETTINGS: dict[str, Any] = {
    **{"max_sequences": 6, "max_step_tokens": 64, "max_context": 384, "kv_host_gib": 0.02},
    "threads": 1,
}
NEIGHBOUR = """
import time, torch
kept = []
try:
    while True:
        kept.append(torch.empty(1 << 28, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    time.sleep(1.5)
"""
console = Console(stderr=True)


@dataclass
class Ledger:
    """What became of the requests of one engine."""

    told: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str) -> None:
        """Count one."""
        with self.lock:
            self.told[what] += 1


def main() -> None:
    """Run, judge, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    figures = soak(60 * options.minutes)
    console.print_json(json.dumps(figures))
    if not options.dry:
        path = write_result("memory_soak", figures)
        if options.out:
            shutil.copy(path, options.out)
    if figures["wrong"] or figures["lost"] or not figures["the same at the end"]:
        raise SystemExit("answers were wrong, or requests were lost that no fault had hit")


def soak(seconds: float) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        experts = Path(folder) / "experts"  # plain weights, which run in float32 anywhere
        export_checkpoint(MODELS / "debian-moe-8m", experts, "dense")
        sources = {"layers": MODELS / "debian-8m-dense", "experts": experts}
        engines = {
            name: stack.enter_context(tight(each, DTYPES[name], name == "experts"))
            for name, each in sources.items()
        }
        ledgers = {name: Ledger() for name in engines}
        probes = {name: expected(engine) for name, engine in engines.items()}
        end = threading.Event()
        threads = [
            threading.Thread(
                target=call,
                args=(engine, probes[name], DTYPES[name] == "float32", ledgers[name], seed, end),
            )
            for name, engine in engines.items()
            for seed in range(CALLERS)
        ]
        faults: Counter[str] = Counter()
        threads.append(threading.Thread(target=harm, args=(list(engines.values()), faults, end)))
        for thread in threads:
            thread.start()
        samples = watch(seconds)
        end.set()
        for thread in threads:
            thread.join()
        again = {name: expected(engine) == probes[name] for name, engine in engines.items()}
        loads = {name: engine.load for name, engine in engines.items()}
    told = {name: dict(ledger.told) for name, ledger in ledgers.items()}
    layers, single = loads["layers"].stream, loads["experts"].experts
    assert layers is not None and single is not None
    return {
        "seconds": seconds,
        "requests": told,
        "wrong": sum(each.get("wrong", 0) for each in told.values()),
        "the same at the end": all(again.values()),
        "lost": sum(each.get("lost", 0) for each in told.values()),
        "faults": dict(faults),
        "preemptions": sum(each.preemptions for each in loads.values()),
        "restored_blocks": sum(use.restored for each in loads.values() for use in each.host),
        "streamed_gb": layers.copied_bytes / 1e9,
        "fetched_experts": single.misses + single.foreseen,
        "memory": {name: judged(samples, name) for name in samples[0]},
    }


@contextmanager
def tight(folder: Path, dtype: str, by_experts: bool) -> Iterator[Engine]:
    """An engine with little more memory than the least that it takes."""
    settings = SETTINGS | {"device": DEVICE, "dtype": dtype}
    try:
        Engine(folder, knobs=Knobs(memory_budget=0.0001), **settings)
    except ConfigError as refused:
        least = float(str(refused).split("for this model is ")[1].split(" GiB")[0])
    for room in ROOMS:
        with Engine(folder, knobs=Knobs(memory_budget=room * least), **settings) as engine:
            if (engine.load.experts is not None) == by_experts:
                yield engine
                return
    raise AssertionError("slots for experts have no room before all of them have")


def prompts() -> list[list[int]]:
    """Of several lengths, some of which begin alike."""
    draw = random.Random(0)
    stem = [draw.randrange(5, 4000) for _ in range(120)]
    return [
        stem[: 20 * number] + [draw.randrange(5, 4000) for _ in range(9 + 30 * number)]
        for number in range(PROBES)
    ]


GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


def expected(engine: Engine) -> list[list[int]]:
    """Answers to the prompts that are asked again and again, one at a time."""
    return [engine.generate(prompt, **GREEDY).token_ids for prompt in prompts()]


def call(
    engine: Engine,
    wanted: list[list[int]],
    exact: bool,
    ledger: Ledger,
    seed: int,
    end: threading.Event,
) -> None:
    """Ask until the end: known prompts, and others that are given up midway.

    Unless they are `exact`, answers to the former may be others than those `wanted`.
    """
    draw, asked = random.Random(seed), prompts()
    while not end.is_set():
        try:
            if draw.random() < 0.6:
                number = draw.randrange(len(asked))
                found = engine.generate(asked[number], **GREEDY).token_ids
                other = "wrong" if exact else "another"
                ledger.note("right" if found == wanted[number] else other)
                continue
            prompt = [draw.randrange(5, 4000) for _ in range(draw.randrange(1, 300))]
            with engine.stream(prompt, max_tokens=60, ignore_eos=True, seed=seed) as stream:
                for _ in range(draw.randrange(12)):
                    next(stream)
            ledger.note("given up")
        except Overloaded:
            ledger.note("refused")  # a step of one sequence had no memory
        except Unavailable as error:
            ledger.note("failed on purpose" if "on purpose" in str(error) else "lost")
        except ConclaveError:
            ledger.note("lost")


def harm(engines: list[Engine], faults: Counter[str], end: threading.Event) -> None:
    """One fault after the other, each on its engine or, on a GPU, on all."""
    draw = random.Random(1)
    kinds: list[tuple[str, Callable[[Engine], None]]] = [("step fails", fail_once)]
    kinds.append(("memory is short", neighbour if torch.cuda.is_available() else short))
    while not end.wait(EVERY):
        name, act = draw.choice(kinds)
        act(draw.choice(engines))
        faults[name] += 1


def fail_once(engine: Engine) -> None:
    """The next step that gets to some layer fails in it."""
    layers = engine.model.runner.decoder.layers
    layer = layers[len(layers) // 2]
    hit = threading.Event()

    def fail(*_: object) -> None:
        if not hit.is_set():
            hit.set()
            raise RuntimeError("on purpose")

    handle = layer.register_forward_hook(fail)
    hit.wait(2.0)
    handle.remove()


def short(engine: Engine) -> None:
    """Steps of more than two sequences have no memory for a while."""
    forward = engine.model.runner.forward

    def refused(chunks: list[Any]) -> torch.Tensor:
        logits = forward(chunks)  # what it wrote is written again
        if len(chunks) > 2:
            raise torch.OutOfMemoryError("on purpose")
        return logits

    with patch.object(engine.model.runner, "forward", refused):
        time.sleep(1.0)


def neighbour(_: Engine) -> None:
    """Another process takes all that is free on the device, for a moment."""
    subprocess.run([sys.executable, "-c", NEIGHBOUR], check=False, timeout=60)


def watch(seconds: float) -> list[dict[str, float]]:
    """MiB, each second."""
    samples = []
    with Progress(console=console) as progress:
        task = progress.add_task("soaking", total=seconds)
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            time.sleep(1.0)
            samples.append(held())
            progress.update(task, completed=time.monotonic() - began)
    return samples


def held() -> dict[str, float]:
    """What the process has, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    told = dict(line.split(":", 1) for line in lines)
    names = {"resident": "VmRSS", "locked": "VmPin"}
    found = {name: int(told[own].split()[0]) / 1024 for name, own in names.items()}
    if torch.cuda.is_available():
        found["reserved on the device"] = torch.cuda.memory_reserved() / 2**20
    return found


def judged(samples: list[dict[str, float]], name: str) -> dict[str, float]:
    """Medians of the second tenth and of the last one, and the most."""
    values, tenth = [each[name] for each in samples], max(1, len(samples) // 10)
    early, late = median(values[tenth : 2 * tenth]), median(values[-tenth:])
    return {
        "early_mib": early,
        "late_mib": late,
        "growth_mib": late - early,
        "most_mib": max(values),
    }


if __name__ == "__main__":
    main()
