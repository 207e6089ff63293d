"""Times on a GPU: some launches recorded as one CUDA graph, replayed, several times over.

A graph has no gaps for Python between launches, as an engine's decode step has none. Callers give
each launch another copy of its weight, so that no launch finds it in the L2 cache.
"""

import math
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

Launch = Callable[[int], object]
"""Does its work with copy number i of the weights."""


class Time(NamedTuple):
    """Microseconds of one launch over the repeats."""

    median: float
    low: float
    high: float


def replayed(launch: Launch, launches: int = 12, repeats: int = 7, milliseconds: float = 3) -> Time:
    """How long launch(0), launch(1), ... take on average; each repeat lasts `milliseconds`."""
    for index in range(2):
        launch(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            launch(index)
    graph.replay()
    once = _milliseconds(graph, 1)
    count = max(1, math.ceil(milliseconds / once))
    times = [_milliseconds(graph, count) / (count * launches) * 1e3 for _ in range(repeats)]
    return Time(median(times), min(times), max(times))


def _milliseconds(graph: torch.cuda.CUDAGraph, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()  # so that the card is busy while the rest is queued
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copies_past_cache(nbytes: int) -> int:
    """Copies of a weight that no L2 cache holds together: 120 MB, or two and a half caches."""
    cache = 0
    if torch.cuda.is_available():
        cache = torch.cuda.get_device_properties().L2_cache_size
    return max(3, math.ceil(max(120e6, 2.5 * cache) / nbytes) + 1)


def launches_over(copies: int, least: int = 12) -> int:
    """Launches of a graph that takes each copy equally often."""
    return copies * math.ceil(least / copies)


def copy_rate() -> Time:
    """GB/s of a copy of 256 MB on the card, bytes read and bytes written."""
    source, target = (torch.randint(256, (256_000_000,), dtype=torch.uint8).cuda() for _ in "12")
    return _rate(replayed(lambda _: target.copy_(source), launches=4), 2 * len(source) / 1e3)


def matmul_rate(size: int = 8192) -> Time:
    """TFLOP/s of a bfloat16 matmul of the vendor's library."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in "12")
    return _rate(replayed(lambda _: left @ right, launches=2, milliseconds=10), 2 * size**3 / 1e6)


def _rate(time: Time, work: float) -> Time:
    return Time(work / time.median, work / time.high, work / time.low)
