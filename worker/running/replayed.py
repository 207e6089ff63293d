"""Decode steps of few shapes, each recorded when it comes again and replayed from then on.

The first step of a shape runs as it is, which loads its kernels and brings up what they work in,
but already with padded inputs at their fixed places: so numbers never depend on whether a step is
replayed. What it gave up: steps with prompts, which have any number of shapes.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory.experts.cache import ExpertCache
from ..memory.experts.module import SlottedPackedExperts
from ..memory.streaming.layers import LayerStream
from ..model.decoder import Decoder
from ..model.layers import Experts
from ..model.packed import PackedExperts
from ..scheduling.workspace import MOST_RECORDINGS
from .batch import Chunk, Step
from .inputs import DecodeInputs, DecodeShape

log = logging.getLogger(__name__)

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""From a call to what repeats it on the same tensors; see `GraphRecorder`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step leaves on the device."""

    logits: Tensor
    """float32 [rows, vocab]."""
    marks: Tensor | None
    """bool [2, T]: tokens that came out as NaN, and tokens whose keys or values had no room; None
    where logits show the former and the latter cannot be."""


@dataclass(frozen=True, slots=True)
class Replaying:
    """How decode steps are recorded, and the largest of them."""

    record: Record
    sequences: int
    context: int
    """Tokens of the longest."""


def can_replay(decoder: Decoder, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a decode step puts the same kernels into a card's stream every time.

    Plain experts wait for the device to tell what was chosen; float32 has no kernels of attention.
    """
    return (
        device.type == "cuda"
        and dtype != torch.float32
        and all(
            isinstance(module, PackedExperts | SlottedPackedExperts)
            for module in decoder.modules()
            if isinstance(module, Experts)
        )
    )


class ReplayedDecode:
    """Steps in which every sequence runs one token and its logits are wanted.

    Args:
        run: a step, of its inputs and of how far off keys and values of its rows may be.
        replaying: how they are recorded.
        windows: the sliding window of each cache group.
        block_size: tokens in a block.
        device: where the step runs.
        experts: whether some are chosen in it.
        stream: what brings weights while it runs, if anything does.
    """

    def __init__(
        self,
        run: Callable[[Step, Tensor], Outcome],
        replaying: Replaying,
        windows: Sequence[int | None],
        block_size: int,
        device: torch.device,
        experts: bool,
        stream: LayerStream | ExpertCache | None,
    ) -> None:
        self._run = run
        self._record: Record | None = replaying.record
        self._windows, self._block_size = windows, block_size
        self._most = replaying.sequences, -(-replaying.context // block_size)
        self._experts, self._stream = experts, stream
        widest = DecodeShape(self._most[0], (self._most[1],) * len(windows))
        self._memory = torch.zeros(widest.numbers, dtype=torch.int64, device=device)
        self._logits = self._marks = torch.empty(0, device=device)
        self._inputs: dict[DecodeShape, DecodeInputs] = {}
        """Of shapes that have run."""
        self._replays: dict[DecodeShape, Callable[[], None]] = {}
        """What was used last is last."""

    @property
    def recordings(self) -> int:
        """Steps that are recorded."""
        return len(self._replays)

    def __call__(self, chunks: Sequence[Chunk], limits: Sequence[float]) -> Outcome:
        """Runs chunks of one token each; see `DecodeInputs.fill` for `limits`.

        What it returns is good until the next step.
        """
        shape = DecodeShape.of(chunks, self._windows, self._block_size, *self._most)
        known = self._inputs.get(shape)
        inputs = known or DecodeInputs(shape, self._memory)
        inputs.fill(chunks, limits, self._windows, self._block_size, self._experts)
        replay = self._replays.pop(shape, None)
        if replay is None and known is not None:
            replay = self._recorded(inputs)
        if replay is None:
            self._step(inputs)
            self._inputs[shape] = inputs
        else:
            if self._stream is not None:
                self._stream.before_replay()
            replay()
            self._replays[shape] = replay
        count = len(chunks)
        has_marks = self._marks.numel() > 0
        return Outcome(self._logits[:count], self._marks[:, :count] if has_marks else None)

    def _step(self, inputs: DecodeInputs) -> None:
        """Run a step and leave its outcome in its fixed place."""
        outcome, rows = self._run(inputs.step, inputs.limits), inputs.shape.rows
        if not self._logits.numel():
            self._logits = outcome.logits.new_empty(self._most[0], outcome.logits.shape[1])
            if outcome.marks is not None:
                self._marks = outcome.marks.new_empty(2, self._most[0])
        self._logits[:rows] = outcome.logits
        if outcome.marks is not None:
            self._marks[:, :rows] = outcome.marks

    def _recorded(self, inputs: DecodeInputs) -> Callable[[], None] | None:
        """A recording of a step; None from the first on that failed."""
        if self._record is None:
            return None
        if len(self._replays) >= MOST_RECORDINGS:
            del self._replays[next(iter(self._replays))]
        if self._stream is not None:
            self._stream.before_recording()
        try:
            return self._record(lambda: self._step(inputs))
        except Exception as error:  # whatever it was: without recordings all goes on
            log.warning("decode steps of new sizes are not recorded any more: %s", error)
            self._record = None
            if self._stream is not None:
                self._stream.recording_failed()
            return None
