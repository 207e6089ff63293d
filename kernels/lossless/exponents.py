"""Exponents of bfloat16 in three bits: the code's sizes, and coding and decoding in plain torch.

Signs and mantissas of weights are as good as random, but few of 256 exponents occur: with
DFloat11 (arXiv 2504.11651) they take 2.6 bits by an entropy code, which has to be read bit by bit.
Here they are coded in `levels` of two bits. Each 1024 neighbours choose a base, so that most of
their exponents are base, base + 1 or base + 2, the three codes of level 0. Those that are not have
a code in level 1: base - 1, base - 2 or base + 3; others of these have one in level 2: base - 3,
base - 4 or base - 5. What is still further is an escape, a byte in a list.

Of normally distributed weights 24 to 30 % are in level 1, 4 to 7 % in level 2 and 0.6 to 1 % in the
list, by their scale, and where one has more another has less: they take 0.63 to 0.76 bits an
element. All three share one room of one bit, which weights of a heavier tail need (Student's t of
five degrees 0.9). Every pattern of 16 bits comes back as it was, and the size is known from the
number of elements alone: 11.03 bits each. With R runs of 4096 elements, the
sections are, each beginning at a multiple of 16 bytes,

| section | type             | bits  | holds                                                       |
| ------- | ---------------- | ----- | ----------------------------------------------------------- |
| rests   | uint8 [R, 4096]  | 8     | sign (bit 7) and mantissa of each element                   |
| level 0 | int32 [2, 128 R] | 2     | bits 0 and bits 1 of all elements' codes                    |
| starts  | int32 [R + 1, 3] | 0.023 | how many elements before the run are in level 1, 2 and list |
| bases   | uint8 [R, 4]     | 0.008 | the base of each block of 1024 elements, 252 at most        |
| room    |                  | 1     | level 1, level 2 and list, one behind the other             |

and in the room, where the last row of `starts` tells how many elements C are in each,

| part    | type         | holds                                                                   |
| ------- | ------------ | ----------------------------------------------------------------------- |
| level 1 | int32 [2, W] | codes of those whose code in level 0 is 3; W is C / 32 + 2 words        |
| level 2 | int32 [2, W] | codes of those whose code in level 1 is 3                               |
| list    | uint8 [C]    | exponents of those whose code in level 2 is 3                           |

Bit b of word w in a plane is that of the element with rank 32 w + b among all that are there.

Lane l of 32 decodes the elements 256 c + 8 l + 2 i + o of a block (c and i below 4, o below 2):
16 adjacent bytes for each c. Ranks go by block, l, o, c and i in all levels: so the bits of a lane
are 16 o + 4 c + i of its word in level 0. Their rests lie as [c / 2, l, c % 2, i / 2, o, i % 2], 16
bytes for each c / 2. Elements behind the end of the tensor have code 0.

What it gave up: three bits for each exponent and a list with room for 5 %, which takes 11.44 bits;
a room for each level, which the level with the most elements at any scale would have to fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CodeError
from . import levels
from .levels import FAR, FURTHER, SPANS

BLOCK = 1024
"""Elements that share a base."""
BLOCKS = 4
"""Of a run, whose elements a program of the kernel decodes: it has to be told their ranks."""
RUN = BLOCKS * BLOCK
LANES = 32
_ROOM = 8
"""Elements that have a byte in the room together."""
_MORE = 128
"""Bytes beyond that: of few elements, what they take varies by chance."""
_CHUNK = 1 << 10
"""Runs coded at a time: 4 million elements, some 200 MB of temporaries."""
_SHAPE = (2, 2, LANES, 2, 2, 2)
"""A block's elements: c / 2, c % 2, l, i / 2, i % 2, o."""
_RESTS = (0, 1, 3, 2, 4, 6, 5)
_RANKS = (0, 3, 6, 1, 2, 4, 5)
"""Orders of the dimensions of [blocks, *_SHAPE] in which things are stored."""


def _padded(size: int) -> int:
    return -(-size // 16) * 16


@dataclass(frozen=True, slots=True)
class ExponentCode:
    """Of a sequence of `elements` bfloat16."""

    elements: int

    @property
    def runs(self) -> int:
        """R."""
        return -(-self.elements // RUN)

    @property
    def room(self) -> int:
        """Bytes for level 1, level 2 and list."""
        return _padded(-(-self.elements // _ROOM) + _MORE)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Bytes of the sections."""
        runs = self.runs
        starts, bases = _padded(4 * 3 * (runs + 1)), _padded(BLOCKS * runs)
        return RUN * runs, RUN // 4 * runs, starts, bases, self.room

    @property
    def bytes(self) -> int:
        """Size of what is coded, a multiple of 16."""
        return sum(self.sizes)

    @property
    def plain_bytes(self) -> int:
        """Size of what is decoded."""
        return 2 * self.elements


def encode(code: ExponentCode, tensor: Tensor) -> Tensor:
    """uint8 [code.bytes] of the elements of `tensor` (bfloat16), on its device.

    CodeError if levels and list take more than their room.
    """
    coded = torch.zeros(code.bytes, dtype=torch.uint8, device=tensor.device)
    rests, first_level, starts, bases, room = _sections(code, coded)
    flat = tensor.reshape(-1).view(torch.int16)
    for runs, own in _chunks(code, flat):
        base, further = _best_bases(_exponents(_blocks(own)), -len(own) % RUN)
        bases[runs] = base.view(-1, BLOCKS)
        starts[1:][runs] = further.view(-1, BLOCKS, 3).sum(1, dtype=torch.int32)
    starts.copy_(starts.cumsum(0))
    ends = starts[-1].tolist()
    _check_room(code, ends)
    *planes, listed = first_level, *_parts(room, ends)
    each = starts[:-1][::_CHUNK].tolist()
    for (runs, own), firsts in zip(_chunks(code, flat), each, strict=True):
        bits = _blocks(own)
        rest = (((bits >> 8) & 0x80) | (bits & 0x7F)).to(torch.uint8)
        rests[runs] = _stored(rest, _RESTS).view(-1, RUN)
        base, exponents = bases[runs].reshape(-1, 1), _exponents(bits)
        exponents.view(-1)[len(own) :] = base.expand(-1, BLOCK).flatten()[len(own) :]
        exponents = _stored(exponents, _RANKS)
        steps, exponents = (exponents.short() - base).flatten(), exponents.flatten()
        for level, first in enumerate((runs.start * RUN, *firsts[:-1])):
            codes = levels.codes_of(steps, level)
            levels.write(planes[level], codes, first)
            far = codes == FAR
            steps, exponents = steps[far], exponents[far]
        listed[firsts[-1] : firsts[-1] + len(exponents)] = exponents
    return coded


def decode(code: ExponentCode, coded: Tensor, out: Tensor) -> None:
    """The inverse of `encode`, into the uint8 [code.plain_bytes] `out`."""
    rests, first_level, starts, bases, room = _sections(code, coded)
    *planes, listed = first_level, *_parts(room, starts[-1].tolist())
    for runs, own in _chunks(code, out.view(torch.int16)):
        exponents = bases[runs].int().repeat_interleave(BLOCK, 1)
        far = torch.ones_like(exponents, dtype=torch.bool)
        ranks = torch.arange(far.numel(), device=far.device).view_as(far) + runs.start * RUN
        for level, bits in enumerate(planes):
            codes = levels.read(bits, ranks)
            exponents += levels.steps_of(codes, level).masked_fill_(~far, 0)
            far &= codes == FAR
            ranks = (starts[:-1][runs, level, None] + far.cumsum(1) - 1).clamp_(min=0)
        exponents[far] = listed[ranks[far]].int()
        exponents = _original(exponents, _RANKS)
        rest = _original(rests[runs], _RESTS).int()
        decoded = ((rest & 0x80) << 8) | (exponents << 7) | (rest & 0x7F)
        own.copy_(decoded.flatten()[: len(own)].to(torch.int16))


def used(code: ExponentCode, coded: Tensor) -> int:
    """Bytes of `coded` up to the end of the list; nothing reads those behind them."""
    *_, starts, _, _ = _sections(code, coded)
    return code.bytes - code.room + _padded(_taken(starts[-1].tolist()))


def _chunks(code: ExponentCode, flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some runs after the other, and what `flat` [code.elements] has of them."""
    for first in range(0, code.runs, _CHUNK):
        last = min(first + _CHUNK, code.runs)
        yield slice(first, last), flat[first * RUN : last * RUN]


def _sections(code: ExponentCode, coded: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rests, planes of level 0 (uint8 [2, 512 R]), starts, bases and room, as views."""
    rests, planes, starts, bases, room = coded.split(list(code.sizes))
    runs = code.runs
    return (
        rests.view(runs, RUN),
        planes.view(2, -1),
        starts.view(torch.int32)[: 3 * (runs + 1)].view(-1, 3),
        bases[: BLOCKS * runs].view(runs, BLOCKS),
        room,
    )


def _parts(room: Tensor, ends: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Planes of level 1 and level 2 (uint8 [2, 4 W]) and list, as views."""
    first, second = (8 * levels.words(count) for count in ends[:-1])
    planes = room[:first].view(2, -1), room[first : first + second].view(2, -1)
    return *planes, room[first + second :]


def _check_room(code: ExponentCode, ends: list[int]) -> None:
    """CodeError if the room is too small for level 1, level 2 and list of so many elements."""
    taken = _taken(ends)
    if taken > code.room:
        shares = " / ".join(f"{count / code.elements:.1%}" for count in ends)
        raise CodeError(
            f"{shares} of {code.elements} exponents are far from those beside them, which takes "
            f"{taken} bytes, and there is room for {code.room}; the weight must travel as it is"
        )


def _taken(ends: list[int]) -> int:
    """Bytes of level 1, level 2 and list of so many elements."""
    *counts, listed = ends
    return sum(8 * levels.words(count) for count in counts) + listed


def _blocks(own: Tensor) -> Tensor:
    """int16 [m, 1024] of int16 [n], with zeros up to whole runs."""
    return F.pad(own, (0, -len(own) % RUN)).view(-1, BLOCK)


def _exponents(bits: Tensor) -> Tensor:
    """uint8 of bfloat16's bits, int16."""
    return ((bits >> 7) & 0xFF).to(torch.uint8)


def _best_bases(exponents: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """For exponents [m, 1024]: the bases with which they take the fewest bits, uint8 [m].

    And how many are then in level 1, level 2 and list, int64 [m, 3]. The last `missing` elements
    are none. A base is 252 at most: so a kernel may add three to it without leaving a byte.
    """
    rows = torch.arange(len(exponents), device=exponents.device)[:, None]
    places = (rows * 256 + exponents).flatten()
    counts = torch.bincount(places[: len(places) - missing], minlength=256 * len(exponents))
    below = F.pad(counts.view(-1, 256).cumsum(1), (1, 0))
    bases = torch.arange(256 - SPANS[-1][1], device=exponents.device)
    further = torch.stack(
        [
            below[:, -1:] - below[:, bases + high + 1] + below[:, (bases + low).clamp(min=0)]
            for low, high in SPANS
        ],
        -1,
    )
    bits = torch.tensor(FURTHER, device=exponents.device)
    best = (further * bits).sum(-1).argmin(1)
    return best.to(torch.uint8), further[torch.arange(len(best), device=best.device), best]


def _stored(elements: Tensor, order: tuple[int, ...]) -> Tensor:
    """[m, 1024] in the order that they are stored in."""
    return elements.view(-1, *_SHAPE).permute(order).reshape(-1, BLOCK)


def _original(stored: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `_stored`."""
    shape = [(0, *_SHAPE)[each] for each in order[1:]]
    back = sorted(range(len(order)), key=order.__getitem__)
    return stored.view(-1, *shape).permute(back).reshape(-1, BLOCK)
