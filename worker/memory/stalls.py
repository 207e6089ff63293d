"""How long computing has waited for copies: host time on a CPU, pairs of events on a GPU.

The GPU is never waited for: pairs are read when they have passed. Such events take time themselves,
between kernels and on the host, so on a GPU one step of `EVERY` is timed and stands for all since
the one before. What it gave up: steps that are replayed as a CUDA graph, in which events tell no
time.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

EVERY = 8
_Pair = tuple[torch.cuda.Event, torch.cuda.Event]


class StallClock:
    """Sums up waiting on one device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._passed = 0
        """Steps since the last that was timed."""
        self._interval = 1
        self._weight = 1
        """Steps that this one stands for; 0 if it is not timed."""
        self._pending: deque[tuple[_Pair, int]] = deque()
        self._spare: list[_Pair] = []

    def begin(self) -> None:
        """Called before each step that is not replayed."""
        self._passed += 1
        self._weight = self._passed if self._passed >= self._interval else 0
        if self._weight:
            self._passed, self._interval = 0, EVERY if self._on_gpu else 1

    @contextmanager
    def waiting(self, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
        """Around what makes a stream wait, the current one unless given."""
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
        elif not self._weight or torch.cuda.is_current_stream_capturing():
            yield
        else:
            start_event, end_event = self._pair()
            start_event.record(stream)
            yield
            end_event.record(stream)
            self._pending.append(((start_event, end_event), self._weight))

    def seconds(self) -> float:
        """Waited since the start, as far as the GPU has come."""
        while self._pending and self._pending[0][0][1].query():
            pair, weight = self._pending.popleft()
            self._seconds += weight * pair[0].elapsed_time(pair[1]) / 1e3
            self._spare.append(pair)
        return self._seconds

    def _pair(self) -> _Pair:
        self.seconds()
        if self._spare:
            return self._spare.pop()
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
