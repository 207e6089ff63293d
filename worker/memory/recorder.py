"""What a decoder computes, copies and waits for, as it happens: the measured `Timeline`.

Host time on a CPU; pairs of events on a GPU, which is waited for at the end alone. A layer that is
kept coded is decoded while it runs, module by module: its computing holds its decoding. Meanwhile
steps must run, not be replayed (`ModelRunner.watched`). What it gave up: the head. Spans are kept
until the end, some hundred bytes each.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..model.decoder import Decoder
from .streaming.layers import LayerStream
from .timeline import Lane, Span, Timeline

_Moment = float | torch.cuda.Event


class StepRecorder:
    """Records one decoder from `begin` to `end`, both called between steps.

    Args:
        decoder: whose layers are watched.
        stream: copies the layers that are streamed, if any are.
        device: where they run.
    """

    def __init__(self, decoder: Decoder, stream: LayerStream | None, device: torch.device) -> None:
        self.timeline = Timeline(0.0, ())
        """What happened, once it has ended."""
        self._decoder, self._stream, self._device = decoder, stream, device
        self._hooks: list[RemovableHandle] = []
        self._spans: list[tuple[Lane, int, _Moment, _Moment]] = []
        self._running: dict[int, _Moment] = {}
        self._base: _Moment = 0.0

    def begin(self) -> None:
        """Watch from now on."""
        self._base = self._now()
        if self._stream is not None:
            self._stream.copies.watch = self.span
        for number, layer in enumerate(self._decoder.layers):
            self._hook(number, layer)

    def end(self) -> None:
        """Watch no more, and wait for what is under way."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._stream is not None:
            self._stream.copies.watch = None
        last = self._now()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spans = (
            Span(lane, layer, self._seconds(begun), self._seconds(ended) - self._seconds(begun))
            for lane, layer, begun, ended in self._spans
        )
        ordered = tuple(sorted(spans, key=lambda span: span.start))
        self.timeline = Timeline(self._seconds(last), ordered)

    @contextmanager
    def span(self, lane: Lane, layer: int) -> Iterator[None]:
        """Around what one lane does, on the current stream."""
        begun = self._now()
        yield
        self._spans.append((lane, layer, begun, self._now()))

    def _hook(self, number: int, layer: nn.Module) -> None:
        """After the layer's weights are there, and before its slot goes to the next."""

        def before(*_: object) -> None:
            self._running[number] = self._now()

        def after(*_: object) -> None:
            self._spans.append(("compute", number, self._running.pop(number), self._now()))

        self._hooks.append(layer.register_forward_pre_hook(before))
        self._hooks.append(layer.register_forward_hook(after, prepend=True))

    def _now(self) -> _Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, moment: _Moment) -> float:
        """From the beginning on."""
        if isinstance(self._base, float):
            assert isinstance(moment, float)
            return moment - self._base
        assert not isinstance(moment, float)
        return float(self._base.elapsed_time(moment)) / 1e3
