"""Positions of N:16 weights as ranks: the code's sizes, and coding and decoding in plain torch.

A group keeps N of 16 columns, in one of C(16, N) ways. Their number in the combinatorial number
system (Knuth, The Art of Computer Programming 4A, 7.2.1.3) takes B bits, fewer than N nibbles: the
rank of positions p1 < p2 < ... < pN is C(p1, 1) + C(p2, 2) + ... + C(pN, N). It is exact, and its
size is known before a byte is read.

| N                  | 1 | 2 | 3  | 4  | 5  | 6  | 7  | 8  |
| ------------------ | - | - | -- | -- | -- | -- | -- | -- |
| B, bits of a rank  | 4 | 7 | 10 | 11 | 13 | 13 | 14 | 14 |

With M for all groups of 128 rows (those of all tiles and experts), the sections are

| section       | bytes          | holds                                                           |
| ------------- | -------------- | --------------------------------------------------------------- |
| values        | [M, N, 64]     | of N:16 int4 alone: byte 2l + j of a slot has row 4l + j in the |
|               |                | low nibble, row 4l + j + 2 in the high one (j is 0 or 1)        |
| planes of 8,  | [M, 16 * W]    | W bits of each row's rank, neighbours side by side, row 0       |
| 4, 2, 1 bits  | for each       | lowest; those W whose sum is B, the first has the lowest bits   |

so that four rows, one word of what is decoded, are at one place of each section.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from ..errors import CodeError
from ..formats import SPAN, TILE

MOST_KEPT = 8
"""Survivors whose positions fit a word of the table."""
WIDTHS = (8, 4, 2, 1)
"""Bits of a plane."""
_CHUNK = 1 << 22
"""Survivors coded at a time, some 100 MB of temporaries."""


@dataclass(frozen=True, slots=True)
class RankCode:
    """Of `groups` groups of 128 rows with `kept` survivors."""

    kept: int
    groups: int
    valued: bool
    """Whether values of four bits lie with the positions, as N:16 int4 has them."""

    @property
    def bits(self) -> int:
        """B, of a rank."""
        return (comb(SPAN, self.kept) - 1).bit_length()

    @property
    def planes(self) -> tuple[int, ...]:
        """The widths of the code's planes, whose sum is B."""
        return tuple(width for width in WIDTHS if self.bits & width)

    @property
    def slots(self) -> int:
        """Rows of 128 bytes of a group when decoded."""
        return self.kept if self.valued else (self.kept + 1) // 2

    @property
    def bytes(self) -> int:
        """Size of what is coded, a multiple of 16."""
        return self.groups * (self.value_bytes + 16 * self.bits)

    @property
    def value_bytes(self) -> int:
        """Of a group's values."""
        return TILE // 2 * self.kept if self.valued else 0

    @property
    def plain_bytes(self) -> int:
        """Size of what is decoded."""
        return self.groups * self.slots * TILE


@functools.cache
def nibbles(kept: int) -> Tensor:
    """int32 [C(16, kept)]: the positions of every rank, the lowest in the lowest nibble."""
    ways = sorted(combinations(range(SPAN), kept), key=lambda way: way[::-1])
    words = [sum(place << 4 * slot for slot, place in enumerate(way)) for way in ways]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def encode(code: RankCode, tensor: Tensor) -> Tensor:
    """uint8 [code.bytes] of the bytes of `tensor`, on its device.

    CodeError if positions of a group do not ascend.
    """
    coded = torch.empty(code.bytes, dtype=torch.uint8, device=tensor.device)
    plain = tensor.reshape(-1).view(torch.uint8).view(code.groups, code.slots, TILE)
    steps = [[comb(place, slot + 1) for place in range(SPAN)] for slot in range(code.kept)]
    counts = torch.tensor(steps, dtype=torch.int32, device=tensor.device)
    slots = torch.arange(code.kept, device=tensor.device)[:, None]
    for own, (values, *planes) in zip(
        plain.split(_step(code)), _sections(code, coded), strict=True
    ):
        places = own & 15 if code.valued else _halves(own)
        if not bool((places[:, 1 : code.kept] > places[:, : code.kept - 1]).all()):
            raise CodeError("positions of a group do not ascend; the weight must travel as it is")
        if bool(places[:, code.kept :].any()):
            raise CodeError("a position too many is not zero; the weight must travel as it is")
        if code.valued:
            fours = (own >> 4).unflatten(-1, (-1, 4))
            values.copy_((fours[..., :2] | fours[..., 2:] << 4).flatten(-2))
        rank = counts[slots, places[:, : code.kept].long()].sum(1, dtype=torch.int32)
        for width, plane in zip(code.planes, planes, strict=True):
            plane.copy_(_packed(rank & ((1 << width) - 1), width))
            rank >>= width
    return coded


def decode(code: RankCode, coded: Tensor, out: Tensor) -> None:
    """The inverse of `encode`, into the uint8 [code.plain_bytes] `out`."""
    table = nibbles(code.kept).to(coded.device)
    plain = out.view(code.groups, code.slots, TILE)
    for own, (values, *planes) in zip(
        plain.split(_step(code)), _sections(code, coded), strict=True
    ):
        rank, shift = torch.zeros(len(own), TILE, dtype=torch.int32, device=out.device), 0
        for width, plane in zip(code.planes, planes, strict=True):
            rank |= _unpacked(plane, width).int() << shift
            shift += width
        words, width = table[rank.long()], 4 if code.valued else 8
        for slot in range(code.slots):
            own[:, slot] = (words >> width * slot) & ((1 << width) - 1)
        if code.valued:
            pairs = values.unflatten(-1, (-1, 2))
            own |= torch.cat((pairs << 4, pairs & 0xF0), -1).flatten(-2)


def _step(code: RankCode) -> int:
    """Groups that are taken at a time."""
    return max(1, _CHUNK // (TILE * code.kept))


def _sections(code: RankCode, coded: Tensor) -> Iterator[list[Tensor]]:
    """Values and planes, as views, of some groups after the other."""
    sizes = [code.value_bytes, *(16 * width for width in code.planes)]
    parts = coded.split([code.groups * size for size in sizes])
    views = [parts[0].view(code.groups, code.kept if code.valued else 0, TILE // 2)]
    views += [part.view(code.groups, -1) for part in parts[1:]]
    step = _step(code)
    for first in range(0, code.groups, step):
        yield [view[first : first + step] for view in views]


def _halves(joined: Tensor) -> Tensor:
    """uint8 [m, 2n, 128] of the low and high nibbles of [m, n, 128]."""
    halves: Tensor = torch.stack((joined & 15, joined >> 4), 2)
    return halves.flatten(1, 2)


def _packed(values: Tensor, width: int) -> Tensor:
    """uint8 [m, 16 * width] from int32 [m, 128] of `width` bits each."""
    each = 8 // width
    shifts = torch.arange(0, 8, width, device=values.device)
    joined: Tensor = values.unflatten(-1, (-1, each)) << shifts
    return joined.sum(-1).to(torch.uint8)


def _unpacked(plane: Tensor, width: int) -> Tensor:
    """uint8 [m, 128], the inverse of `_packed`."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    parts: Tensor = (plane[..., None] >> shifts) & ((1 << width) - 1)
    return parts.flatten(-2)
