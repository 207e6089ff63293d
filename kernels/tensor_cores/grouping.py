"""Tokens that lie sorted by expert, cut into blocks that programs of a grouped product take.

A block has up to so many tokens, all of one expert. How many blocks there are is known on the
device alone; grids have `most_blocks` of them, and those behind the last one are empty.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..launching.launch import Kernel, Variant
from ..launching.targets import NVIDIA

MOST_TOKENS = 4096
"""Of one table; more tokens are multiplied in parts."""
_SIZES = (128, 512, 2048, 2 * MOST_TOKENS)
_WARPS = 8


@triton.jit
def _expert_blocks(blocks, experts, tokens, count, EACH: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    fits = place < tokens
    expert = tl.load(experts + place, mask=fits, other=-1)
    before = tl.load(experts + place - 1, mask=fits & (place > 0), other=-1)
    after = tl.load(experts + place + 1, mask=place + 1 < tokens, other=-1)
    run = tl.associative_scan(tl.where(expert != before, place, 0), 0, _larger)
    begins = fits & ((place - run) % EACH == 0)
    ends = fits & (((place - run) % EACH == EACH - 1) | (expert != after))
    index = tl.cumsum(begins.to(tl.int32), 0) - 1
    tl.store(blocks + 3 * index, expert, mask=begins & (index < count))
    tl.store(blocks + 3 * index + 1, place, mask=begins & (index < count))
    tl.store(blocks + 3 * index + 2, place + 1, mask=ends & (index < count))
    empty = (place >= tl.sum(begins.to(tl.int32), 0)) & (place < count)
    for field in tl.static_range(3):
        tl.store(blocks + 3 * place + field, 0, mask=empty)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@gluon.jit
def share_of(blocks, tokens, grouped, TOKENS: gl.constexpr):
    """(expert, first token, last token + 1) of this program; without a table all have expert 0."""
    number = gl.program_id(0)
    expert = 0
    start = number * TOKENS
    stop = tokens
    if grouped > 0:
        expert = gl.load(blocks + number * 3)
        start = gl.load(blocks + number * 3 + 1)
        stop = gl.load(blocks + number * 3 + 2)
    return expert, start, stop


_table = Kernel(_expert_blocks, name="expert_blocks")


def most_blocks(tokens: int, experts: int, each: int) -> int:
    """No fewer than there can be of `tokens` that lie together by their experts."""
    return min(tokens, experts) + tokens // each


def variants() -> Iterator[Variant]:
    """What the bundle holds, for NVIDIA's cards."""
    types = ("*i32", "*i32", "i32", "i32")
    for tokens, size in product((16, 32, 64, 128), _SIZES):
        yield Variant(_table, types, {"EACH": tokens, "SIZE": size}, _WARPS, 1, NVIDIA)


def expert_blocks(experts: Tensor, stack: int, each: int) -> Tensor:
    """int32 [blocks, 3]: expert, first token, last token + 1, each of at most `each` tokens.

    `experts` is int32 [T], equal ones side by side, at most `MOST_TOKENS` of `stack` different
    ones. Blocks that are not needed are zeros. Of what lies apart there may be more blocks than
    there is room for.
    """
    tokens = len(experts)
    count = most_blocks(tokens, stack, each)
    blocks = torch.empty(count, 3, dtype=torch.int32, device=experts.device)
    size = next(size for size in _SIZES if size >= max(tokens, count))
    constants = {"EACH": each, "SIZE": size}
    _table.launch((1,), blocks, experts, tokens, count, constants=constants, warps=_WARPS, stages=1)
    return blocks
