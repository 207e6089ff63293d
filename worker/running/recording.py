"""The decode step, recorded once and replayed without Python: a CPU's CUDA graph.

Half of a small model's step on a CPU is Python between the torch calls (8.1 ms a step against 4.4
recorded, 8M parameters, one thread). The recording is a TorchScript trace of the same calls, so it
gives the same numbers. It serves steps in which every sequence runs one token, whatever their
number and length. What it gave up: models with experts, whose routing decides in Python which
experts run, and steps with prompts, where the products themselves are what takes time.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.config import ModelConfig
from .batch import Chunk, Step, build_step, decode_step
from .caches import PlainCaches, Tensors

Forward = Callable[[Step, PlainCaches], Tensor]


def can_record(config: ModelConfig, device: torch.device) -> bool:
    """Whether a decode step of this model is the same sequence of torch calls every time."""
    return device.type == "cpu" and all(layer.experts is None for layer in config.layers)


class RecordedDecode:
    """A recorded decode step; call it like what was recorded.

    Args:
        forward: runs a step on given caches and returns its logits; must only call torch.
        caches: the caches that the recording will read and write.
        windows: the sliding window of each cache group.
        block_size: tokens in a block.
    """

    def __init__(
        self,
        forward: Forward,
        caches: Tensors,
        windows: list[int | None],
        block_size: int,
    ) -> None:
        layers = tuple(caches)
        # Inputs, not constants: what the trace thinks constant it may compute ahead.
        self._keys = tuple(keys for keys, _ in caches.values())
        self._values = tuple(values for _, values in caches.values())

        def run(
            tokens: Tensor,
            positions: Tensor,
            slots: tuple[Tensor, ...],
            tables: tuple[Tensor, ...],
            offsets: tuple[Tensor, ...],
            keys: tuple[Tensor, ...],
            values: tuple[Tensor, ...],
        ) -> Tensor:
            step = decode_step(tokens, positions, slots, tables, offsets)
            tensors = dict(zip(layers, zip(keys, values, strict=True), strict=True))
            return forward(step, PlainCaches(tensors))

        # Two sequences of two lengths, so that nothing in the recording takes a 1 for granted.
        tables = tuple([0, 0] for _ in windows)
        chunks = [Chunk([0], 0, tables, 1), Chunk([0], block_size, tables, 1)]
        example = build_step(chunks, windows, block_size, torch.device("cpu"))
        with warnings.catch_warnings(), torch.inference_mode():
            # TorchScript warns of its age, and of every shape that a trace takes as given.
            warnings.simplefilter("ignore")
            self._recording = torch.jit.trace(run, self._inputs(example), check_trace=False)

    def __call__(self, step: Step) -> Tensor:
        """float32 logits [sequences, vocab] of a step in which every sequence decodes."""
        logits: Tensor = self._recording(*self._inputs(step))
        return logits

    def _inputs(self, step: Step) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        (part,) = step.parts
        return (
            step.tokens,
            step.positions,
            step.slots,
            part.tables,
            part.offsets,
            self._keys,
            self._values,
        )
