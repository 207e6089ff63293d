"""Decode steps padded to few shapes, and all their inputs in one piece of memory.

A recording of a step reads fixed addresses and has fixed sizes. So the number of sequences and the
blocks of their tables are rounded up, and one copy brings what changes from step to step. Rows that
only pad repeat the shortest sequence's token and store nothing. They see one key, as all that they
read is for nothing; but where there are experts they see what that sequence does, so that they
choose no others, which would be read or even fetched. What it gave up: up to half of the rows and
of the tables' width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .batch import Chunk, Integers, Step, decode_step, reached

FEWEST_BLOCKS = 32
"""Of a table without a window."""
Array = TypeVar("Array", Tensor, Integers)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """The sizes of a step in which every sequence runs one token."""

    rows: int
    """Sequences, with those that only pad."""
    widths: tuple[int, ...]
    """Blocks of a sequence's table, for each cache group."""

    @classmethod
    def of(
        cls,
        chunks: Sequence[Chunk],
        windows: Sequence[int | None],
        block_size: int,
        most_rows: int,
        most_blocks: int,
    ) -> "DecodeShape":
        """The least that has room for `chunks`, of those that may be recorded."""
        longest = max(chunk.end for chunk in chunks)
        blocks = min(_padded_blocks(-(-longest // block_size)), most_blocks)
        widths = (
            blocks if window is None else min(blocks, -(-(window - 1) // block_size) + 1)
            for window in windows
        )
        return cls(min(_padded_rows(len(chunks)), most_rows), tuple(widths))

    @property
    def numbers(self) -> int:
        """int64 that `DecodeInputs` takes."""
        return sum(self._sizes())

    def split(self, memory: Array) -> Iterator[Array]:
        """`memory`, one part after the other: tokens, positions, limits; slots, offsets and tables
        of each group."""
        sizes = self._sizes()
        wanted = [self.rows] * (3 + 2 * len(self.widths))
        wanted += [self.rows * width for width in self.widths]
        for begin, size in zip(accumulate(sizes, initial=0), wanted, strict=False):
            yield memory[begin : begin + size]

    def _sizes(self) -> list[int]:
        """Even, as kernels want addresses that are multiples of 16 bytes."""
        each = -(-self.rows // 2) * 2
        tables = [-(-self.rows * width // 2) * 2 for width in self.widths]
        return [each] * (3 + 2 * len(self.widths)) + tables


class DecodeInputs:
    """The inputs of steps of one shape.

    Args:
        shape: of the step.
        memory: int64, at least `shape.numbers`; other shapes may share it.
    """

    def __init__(self, shape: DecodeShape, memory: Tensor) -> None:
        self.shape = shape
        self._memory = memory[: shape.numbers]
        groups = len(shape.widths)
        tokens, positions, limits, *rest = shape.split(self._memory)
        slots, offsets, flat = rest[:groups], rest[groups : 2 * groups], rest[2 * groups :]
        tables = (own.view(shape.rows, -1) for own in flat)
        self.step: Step = decode_step(
            tokens, positions, tuple(slots), tuple(tables), tuple(offsets)
        )
        self.limits = limits.view(torch.float32)[: shape.rows]
        """How far off keys and values of each row may be."""

    def fill(
        self,
        chunks: Sequence[Chunk],
        limits: Sequence[float],
        windows: Sequence[int | None],
        block_size: int,
        experts: bool,
    ) -> None:
        """Bring in chunks of one token each, and their limits; and whether experts are chosen."""
        host = np.zeros(self.shape.numbers, np.int64)
        groups, count = len(windows), len(chunks)
        shortest = min(range(count), key=lambda row: chunks[row].end)
        tokens, positions, errors, *rest = self.shape.split(host)
        tokens[:count] = [chunk.tokens[0] for chunk in chunks]
        positions[:count] = [chunk.start for chunk in chunks]
        for group, window in enumerate(windows):
            slots, offsets = rest[group], rest[groups + group]
            table = rest[2 * groups + group].reshape(self.shape.rows, -1)
            for row, chunk in enumerate(chunks):
                first, blocks = reached(chunk, group, window, block_size)
                offsets[row] = chunk.start - first * block_size
                slots[row] = blocks[-1] * block_size + chunk.start % block_size
                table[row, : len(blocks)] = blocks
                table[row, len(blocks) :] = blocks[0]
            offsets[count:] = offsets[shortest] if experts else 0
            table[count:], slots[count:] = table[shortest], -1
        tokens[count:], positions[count:] = tokens[shortest], positions[shortest]
        errors.view(np.float32)[:count] = limits
        self._memory.copy_(torch.from_numpy(host))


def _padded_rows(count: int) -> int:
    """The next power of two up to 16, then the next half of one as well."""
    power = 1 << (count - 1).bit_length()
    half = power * 3 // 4
    return half if half >= max(count, 17) else power


def _padded_blocks(count: int) -> int:
    return max(FEWEST_BLOCKS, 1 << (count - 1).bit_length())
