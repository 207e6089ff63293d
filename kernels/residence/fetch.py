"""Experts on the list of `claim` brought from locked host memory into their slots, by processors.

Copy engines need a host that knows what to copy; here the list is known on the device alone. An
expert lies on the host in one piece, and on the device in a stack of slots for each of its parts.
Programs take 16 KiB at a time, eight loads of 16 bytes in flight in each thread. On an H100 that
reaches 49 GB/s of 55 for eight experts of 3 MB and 39 for one, which a miss must bear; what comes
by prediction comes while others compute. What it gave up: bulk copies by TMA (untested).
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from .table import SlotTable

_WORDS = 2048
"""int64 that a program takes at a time."""
_WARPS = 4
_PROGRAMS = 32
"""They fill the link: 128 are as fast alone, but whoever computes beside them is slower (a step of
the 26B shape 0.9 ms of 6.6, on an H100)."""
_FIELDS = tl.constexpr(4)


@triton.jit
def _fetch(
    fetches,
    addresses,
    parts,
    chunks,
    experts,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    POISON: tl.constexpr,
):
    pair = tl.arange(0, WORDS // 2)[:, None]
    word = tl.arange(0, 2)[None, :]
    for item in range(tl.program_id(0), tl.load(fetches) * chunks, tl.num_programs(0)):
        index = item // chunks
        chunk = item % chunks
        expert = tl.load(fetches + 1 + index)
        slot = tl.load(fetches + 1 + experts + index).to(tl.int64)
        source = tl.load(addresses + expert)
        # The last part that begins at or before this chunk.
        begin = tl.load(parts)
        offset = tl.load(parts + 1)
        stack = tl.load(parts + 2)
        size = tl.load(parts + 3)
        for part in tl.static_range(1, PARTS):
            first = tl.load(parts + part * _FIELDS)
            here = chunk >= first
            begin = tl.where(here, first, begin)
            offset = tl.where(here, tl.load(parts + part * _FIELDS + 1), offset)
            stack = tl.where(here, tl.load(parts + part * _FIELDS + 2), stack)
            size = tl.where(here, tl.load(parts + part * _FIELDS + 3), size)
        start = (chunk - begin) * WORDS
        inside = 2 * pair < size // 8 - start
        place = start + 2 * pair + word
        target = tl.multiple_of((stack + slot * size).to(tl.pointer_type(tl.int64)), 16) + place
        if POISON:
            tl.store(target, tl.full([WORDS // 2, 2], -1, tl.int64), mask=inside)
        else:
            origin = tl.multiple_of((source + offset).to(tl.pointer_type(tl.int64)), 16) + place
            tl.store(target, tl.load(origin, mask=inside, other=0), mask=inside)


_fetched = Kernel(_fetch, name="fetch_slots", grid=str(_PROGRAMS))


def variants() -> Iterator[Variant]:
    """What the bundle holds: plain experts, and those with codes, positions and scales."""
    types = ("*i32", "*i64", "*i64", "i32", "i32")
    for parts, poison in product((2, 4, 6), (False, True)):
        constants = {"PARTS": parts, "WORDS": _WORDS, "POISON": poison}
        yield Variant(_fetched, types, constants, _WARPS, 1)


class Fetcher:
    """Brings experts of one kind.

    Args:
        addresses: int64 [layers * experts], of each expert's bytes in host memory that the device
            can read, in multiples of 16.
        stacks: of each part of an expert, uint8 [slots, bytes], bytes in multiples of 16.
        offsets: where in an expert's bytes each part begins, in multiples of 16.

    Raises KernelInputError if one is no multiple of 16.
    """

    def __init__(self, addresses: Tensor, stacks: Sequence[Tensor], offsets: Sequence[int]) -> None:
        self.addresses = addresses
        self._chunks = 0
        rows: list[list[int]] = []
        for stack, offset in zip(stacks, offsets, strict=True):
            size = stack.shape[1]
            if size % 16 or offset % 16 or stack.data_ptr() % 16 or not stack.is_contiguous():
                raise KernelInputError(f"a part of {size} bytes at {offset}: no multiples of 16")
            rows.append([self._chunks, offset, stack.data_ptr(), size])
            self._chunks += -(-size // (8 * _WORDS))
        self._stacks = stacks  # keeps what the addresses point to
        self._table = torch.tensor(rows, dtype=torch.int64, device=addresses.device)

    def fetch(self, table: SlotTable, poison: bool = False) -> None:
        """All on the table's list; or fill their slots with NaN, if `poison`."""
        _fetched.launch(
            (_PROGRAMS,),
            *(table.fetches, self.addresses, self._table, self._chunks, table.experts),
            constants={"PARTS": len(self._stacks), "WORDS": _WORDS, "POISON": poison},
            warps=_WARPS,
            stages=1,
        )
