"""Levels of two bits: three numbers have a code each, the fourth sends an element one level down.

A level's codes lie as two bit planes without gaps: an element's bit is, in each plane, that of its
rank among all elements that came so far down. So what most elements share costs two bits, and what
few need costs only them more.
"""

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = ((0, 1, 2), (-1, -2, 3), (-3, -4, -5))
"""Of each level's codes 0, 1 and 2: how far an exponent is above its base."""
SPANS = tuple((min(steps), max(steps)) for steps in accumulate(STEPS))
"""Of each level: the lowest and the highest step that it and those above it have codes for."""
FURTHER = (2, 2, 8)
"""Bits that an element takes further down if a level has no code for it: the last is a byte."""
FAR = 3
"""The code of an element that the next level tells more of, or, behind the last, a list."""
WORD = 32
"""Bits of a plane's words."""


def words(count: int) -> int:
    """Of a plane of `count` codes: any word that holds one has a next one."""
    return count // WORD + 2


def codes_of(steps: Tensor, level: int) -> Tensor:
    """uint8: each step's code in a level."""
    codes = torch.full_like(steps, FAR, dtype=torch.uint8)
    for code, step in enumerate(STEPS[level]):
        codes.masked_fill_(steps == step, code)
    return codes


def steps_of(codes: Tensor, level: int) -> Tensor:
    """int32: each code's step; 0 for those that are further down."""
    table = torch.tensor((*STEPS[level], 0), dtype=torch.int32, device=codes.device)
    return table[codes.int()]


def write(planes: Tensor, codes: Tensor, first: int) -> None:
    """Puts codes, uint8 [n], at the ranks from `first` on of uint8 [2, size], zeros until then."""
    before = first % 8
    padded = F.pad(codes, (before, -(before + len(codes)) % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    own = planes[:, first // 8 : first // 8 + len(padded)]
    for bit in range(2):
        own[bit] |= (((padded >> bit) & 1) << places).sum(1, dtype=torch.uint8)


def read(planes: Tensor, ranks: Tensor) -> Tensor:
    """uint8: the codes at `ranks`, int64 of any shape, of uint8 [2, size]."""
    bits: Tensor = (planes[:, ranks >> 3] >> (ranks & 7).to(torch.uint8)) & 1
    return bits[0] | bits[1] << 1
