"""Records brought into rows of stacks, and back, as a list on the device says.

A record lies in one piece: an expert in locked host memory, or a cache's block in a buffer. Its
parts go into the same row of a stack for each of them: slots of experts' weights, or the layers'
keys and values. Copy engines need a host that knows what to copy, and one copy for each part.

Programs take 16 KiB at a time, eight loads of 16 bytes in flight in each thread. From the host's
memory an H100 reaches 49 GB/s of 55 for eight experts of 3 MB and 39 for one, which a miss must
bear; what comes by prediction comes while others compute. What it gave up: bulk copies by TMA
(untested).
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant

_WORDS = 2048
"""int64 that a program takes at a time."""
_WARPS = 4
_PROGRAMS = 32
"""They fill the link: 128 are as fast alone, but whoever computes beside them is slower (a step of
the 26B shape 0.9 ms of 6.6, on an H100)."""
_FIELDS = tl.constexpr(4)
FETCH, POISON, COLLECT = range(3)
_POISON, _COLLECT = tl.constexpr(POISON), tl.constexpr(COLLECT)


@triton.jit
def _move(listed, records, chunks, count, room, WORDS: tl.constexpr, WAY: tl.constexpr):
    pair = tl.arange(0, WORDS // 2)[:, None]
    word = tl.arange(0, 2)[None, :]
    for item in range(tl.program_id(0), tl.load(listed) * count, tl.num_programs(0)):
        index = item // count
        own = chunks + item % count * _FIELDS
        record = tl.load(records + tl.load(listed + 1 + index)) + tl.load(own)
        row = tl.load(listed + 1 + room + index).to(tl.int64)
        place = tl.load(own + 1) + row * tl.load(own + 2)
        inside = 2 * pair < tl.load(own + 3)
        there = tl.multiple_of(record.to(tl.pointer_type(tl.int64)), 16) + 2 * pair + word
        here = tl.multiple_of(place.to(tl.pointer_type(tl.int64)), 16) + 2 * pair + word
        if WAY == _POISON:
            tl.store(here, tl.full([WORDS // 2, 2], -1, tl.int64), mask=inside)
        elif WAY == _COLLECT:
            tl.store(there, tl.load(here, mask=inside, other=0), mask=inside)
        else:
            tl.store(here, tl.load(there, mask=inside, other=0), mask=inside)


_moved = Kernel(_move, name="move_records", grid=str(_PROGRAMS))


def variants() -> Iterator[Variant]:
    """What the bundle holds."""
    types = ("*i32", "*i64", "*i64", "i32", "i32")
    for way in (FETCH, POISON, COLLECT):
        yield Variant(_moved, types, {"WORDS": _WORDS, "WAY": way}, _WARPS, 1)


class Fetcher:
    """Moves records of one kind. Lists are int32 [1 + 2 * n]: how many, which records, which rows.

    Args:
        records: int64 [count], the address of each, a multiple of 16 that the device can read.
        stacks: of each part of a record, uint8 [rows, bytes], bytes in multiples of 16.
        offsets: where in a record each part begins, in multiples of 16.

    Raises KernelInputError if one is no multiple of 16.
    """

    def __init__(self, records: Tensor, stacks: Sequence[Tensor], offsets: Sequence[int]) -> None:
        self._records = records
        chunks: list[list[int]] = []
        for stack, offset in zip(stacks, offsets, strict=True):
            size = stack.shape[1]
            if size % 16 or offset % 16 or stack.data_ptr() % 16 or not stack.is_contiguous():
                raise KernelInputError(f"a part of {size} bytes at {offset}: no multiples of 16")
            for begin in range(0, size, 8 * _WORDS):
                words = min(_WORDS, (size - begin) // 8)
                chunks.append([offset + begin, stack.data_ptr() + begin, size, words])
        self._stacks = stacks  # keeps what the addresses point to
        self._chunks = torch.tensor(chunks, dtype=torch.int64, device=records.device)

    def fetch(self, listed: Tensor, poison: bool = False) -> None:
        """The records of a list into their rows; or fill the rows with NaN, if `poison`."""
        self._move(listed, POISON if poison else FETCH)

    def collect(self, listed: Tensor) -> None:
        """The rows of a list into their records."""
        self._move(listed, COLLECT)

    def _move(self, listed: Tensor, way: int) -> None:
        _moved.launch(
            (_PROGRAMS,),
            *(listed, self._records, self._chunks, len(self._chunks), len(listed) // 2),
            constants={"WORDS": _WORDS, "WAY": way},
            warps=_WARPS,
            stages=1,
        )
