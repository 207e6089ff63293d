"""How long computing has waited for copies: host time on a CPU, pairs of events on a GPU.

The GPU is never waited for: pairs are read when they have passed. What it gave up: steps that are
replayed as a CUDA graph, in which events tell no time.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_Pair = tuple[torch.cuda.Event, torch.cuda.Event]


class StallClock:
    """Sums up waiting on one device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._pending: deque[_Pair] = deque()
        self._spare: list[_Pair] = []

    @contextmanager
    def waiting(self, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
        """Around what makes a stream wait, the current one unless given."""
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
        elif torch.cuda.is_current_stream_capturing():
            yield
        else:
            start_event, end_event = self._pair()
            start_event.record(stream)
            yield
            end_event.record(stream)
            self._pending.append((start_event, end_event))

    def seconds(self) -> float:
        """Waited since the start, as far as the GPU has come."""
        while self._pending and self._pending[0][1].query():
            pair = self._pending.popleft()
            self._seconds += pair[0].elapsed_time(pair[1]) / 1e3
            self._spare.append(pair)
        return self._seconds

    def _pair(self) -> _Pair:
        self.seconds()
        if self._spare:
            return self._spare.pop()
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
