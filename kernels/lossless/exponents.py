"""Exponents of bfloat16 in three bits: the code's sizes, and coding and decoding in plain torch.

Signs and mantissas of weights are as good as random, but few of 256 exponents occur: with
DFloat11 (arXiv 2504.11651) they take 2.6 bits by an entropy code, which has to be read bit by bit.
Here they have a fixed length: each 1024 neighbours choose a base, and code c, 0 to 6, stands for
the exponent base + c. Code 7 is an escape: that exponent is the next byte of a list, which has
room for 5 % of all (normally distributed weights fill it to 2.5 or 3). Every pattern of 16 bits
comes back as it was, and the size is known from the number of elements alone: 11.44 bits each.

With M blocks of 1024 elements, the sections are, each beginning at a multiple of 16 bytes,

| section    | type             | holds                                                         |
| ---------- | ---------------- | ------------------------------------------------------------- |
| rests      | uint8 [M, 1024]  | sign (bit 7) and mantissa of each element                     |
| planes     | int32 [M, 3, 32] | bit 0, 1 and 2 of the codes                                   |
| starts     | int32 [M]        | where in the list the block's escapes begin                   |
| bases      | uint8 [M]        | the smallest exponent of each block's codes, 248 at most      |
| list       | uint8            | escaped exponents                                             |

Lane l of 32 decodes the elements 256 c + 8 l + 2 i + o of a block (c and i below 4, o below 2):
16 adjacent bytes for each c. Their bits are 16 o + 4 c + i of its word of each plane; their rests
lie as [c / 2, l, c % 2, i / 2, o, i % 2], 16 bytes for each c / 2; their escapes follow each other
by l, c, i, o. Elements behind the end of the tensor have code 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CodeError

BLOCK = 1024
"""Elements that share a base."""
LANES = 32
WINDOW = 7
"""Exponents that have a code."""
ROOM = 20
"""One of so many elements may be an escape."""
_CHUNK = 1 << 12
"""Blocks coded at a time: 4 million elements, some 200 MB of temporaries."""
_SHAPE = (2, 2, LANES, 2, 2, 2)
"""A block's elements: c / 2, c % 2, l, i / 2, i % 2, o."""
_RESTS = (0, 1, 3, 2, 4, 6, 5)
_BITS = (0, 3, 6, 1, 2, 4, 5)
_ESCAPES = (0, 3, 1, 2, 4, 5, 6)
"""Orders of the dimensions of [blocks, *_SHAPE] in which things are stored."""


def _padded(size: int) -> int:
    return -(-size // 16) * 16


@dataclass(frozen=True, slots=True)
class ExponentCode:
    """Of a run of `elements` bfloat16."""

    elements: int

    @property
    def blocks(self) -> int:
        """M."""
        return -(-self.elements // BLOCK)

    @property
    def room(self) -> int:
        """Escapes that the list can hold."""
        return _padded(-(-self.elements // ROOM))

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Bytes of the sections."""
        blocks = self.blocks
        fixed = (BLOCK * blocks, BLOCK * 3 // 8 * blocks, _padded(4 * blocks), _padded(blocks))
        return *fixed, self.room

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

    CodeError if there are more escapes than the list has room for.
    """
    coded = torch.zeros(code.bytes, dtype=torch.uint8, device=tensor.device)
    rests, planes, starts, bases, listed = _sections(code, coded)
    flat, count = tensor.reshape(-1).view(torch.int16), 0
    for first in range(0, code.blocks, _CHUNK):
        own = flat[first * BLOCK : (first + _CHUNK) * BLOCK]
        blocks = slice(first, first + -(-len(own) // BLOCK))
        missing = -len(own) % BLOCK
        bits = F.pad(own, (0, missing)).view(-1, BLOCK)
        exponents = ((bits >> 7) & 0xFF).to(torch.uint8)
        rest = (((bits >> 8) & 0x80) | (bits & 0x7F)).to(torch.uint8)
        base = _best_bases(exponents, missing)
        steps = exponents.int() - base[:, None].int()
        escaped = (steps < 0) | (steps >= WINDOW)
        steps.masked_fill_(escaped, WINDOW)
        if missing:
            steps[-1, -missing:] = 0
            escaped[-1, -missing:] = False
        in_order = _stored(escaped, _ESCAPES)
        found = _stored(exponents, _ESCAPES)[in_order]
        if count + len(found) > code.room:
            raise CodeError(
                f"more than {code.room} of {code.elements} exponents are far from those beside "
                "them; the weight must travel as it is"
            )
        listed[count : count + len(found)] = found
        each = in_order.sum(1)
        starts[blocks] = (count + each.cumsum(0) - each).int()
        bases[blocks] = base
        rests[blocks] = _stored(rest, _RESTS)
        planes[blocks] = _planes(_stored(steps.to(torch.uint8), _BITS))
        count += len(found)
    return coded


def decode(code: ExponentCode, coded: Tensor, out: Tensor) -> None:
    """The inverse of `encode`, into the uint8 [code.plain_bytes] `out`."""
    rests, planes, starts, bases, listed = _sections(code, coded)
    flat = out.view(torch.int16)
    for first in range(0, code.blocks, _CHUNK):
        blocks = slice(first, first + _CHUNK)
        own = flat[first * BLOCK : (first + _CHUNK) * BLOCK]
        steps = _steps(planes[blocks])
        exponents = bases[blocks, None].int() + _original(steps, _BITS).int()
        escaped = _stored(_original(steps == WINDOW, _BITS), _ESCAPES)
        place = starts[blocks, None] + escaped.cumsum(1) - 1
        taken = listed[place.clamp(0, code.room - 1)].int()
        in_order = torch.where(escaped, taken, _stored(exponents, _ESCAPES))
        exponents = _original(in_order, _ESCAPES)
        rest = _original(rests[blocks], _RESTS).int()
        bits = ((rest & 0x80) << 8) | (exponents << 7) | (rest & 0x7F)
        own.copy_(bits.flatten()[: len(own)].to(torch.int16))


def _sections(code: ExponentCode, coded: Tensor) -> tuple[Tensor, ...]:
    """Rests, planes (uint8 [M, 3, 128]), starts, bases and list, as views."""
    rests, planes, starts, bases, listed = coded.split(list(code.sizes))
    blocks = code.blocks
    return (
        rests.view(blocks, BLOCK),
        planes.view(blocks, 3, BLOCK // 8),
        starts.view(torch.int32)[:blocks],
        bases[:blocks],
        listed,
    )


def _best_bases(exponents: Tensor, missing: int) -> Tensor:
    """uint8 [m] for exponents [m, 1024]: the lowest of seven neighbours that most are among.

    The last `missing` elements are none. 255, of infinities, is never among them: so a kernel may
    add seven to any base without leaving a byte.
    """
    rows = torch.arange(len(exponents), device=exponents.device)[:, None]
    places = (rows * 256 + exponents).flatten()
    counts = torch.bincount(places[: len(places) - missing], minlength=256 * len(exponents))
    sums = F.pad(counts.view(-1, 256).cumsum(1), (1, 0))
    return (sums[:, WINDOW:-1] - sums[:, : -WINDOW - 1]).argmax(1).to(torch.uint8)


def _stored(elements: Tensor, order: tuple[int, ...]) -> Tensor:
    """[m, 1024] in the order that they are stored in."""
    return elements.view(-1, *_SHAPE).permute(order).reshape(-1, BLOCK)


def _original(stored: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `_stored`."""
    shape = [(0, *_SHAPE)[each] for each in order[1:]]
    back = sorted(range(len(order)), key=order.__getitem__)
    return stored.view(-1, *shape).permute(back).reshape(-1, BLOCK)


def _planes(steps: Tensor) -> Tensor:
    """uint8 [m, 3, 128] of codes [m, 1024] in the order of bits."""
    places = torch.arange(8, dtype=torch.uint8, device=steps.device)
    planes = [((steps >> bit) & 1).unflatten(-1, (-1, 8)) << places for bit in range(3)]
    return torch.stack([plane.sum(-1, dtype=torch.uint8) for plane in planes], 1)


def _steps(planes: Tensor) -> Tensor:
    """The inverse of `_planes`."""
    places = torch.arange(8, dtype=torch.uint8, device=planes.device)
    bits = ((planes[..., None] >> places) & 1).flatten(2)
    return bits[:, 0] | bits[:, 1] << 1 | bits[:, 2] << 2
