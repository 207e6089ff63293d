"""Activations as integers of 8 bits, for products of integers; a row within `max_error`, measured.

The error of a row is ||x - stored|| / ||x||. Where x / step rounded to -127..127, the step being
the row's largest magnitude over 127, is near enough, that is all. Otherwise the step is as large as
the error allows, and the few numbers that are beyond 127 steps have a second digit, worth 254
steps: x / step = first + 254 * second. A product adds second digits for those blocks of 128 columns
that any row of its tile has one in, which are few where outliers keep to some channels. So one
program does for all rows, and the host need not know what became of them.

Rows with one digit take places from the first on, those with two from the last one down, counted on
the device: tiles with second digits are few. The order differs from run to run, what comes of a row
does not, as sums of integers are exact.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from ..launching.targets import HOPPER

LIMIT = 127
"""The largest digit."""
SECOND = 2 * LIMIT
"""Steps in one of the second digit."""
TALL = 128
"""Places of a tile."""
WIDE = 128
"""Columns of a block."""
LEAST_ERROR = 0.005
"""Below, a step of what is allowed could be too small for the largest number of a row, and sums too
large for 32 bits."""
MOST_COLUMNS = 1 << 15
_LIMIT = tl.constexpr(float(LIMIT))
_SECOND = tl.constexpr(float(SECOND))
_TALL = tl.constexpr(TALL)
_WIDE = tl.constexpr(WIDE)
_LEAST = tl.constexpr(2.0**-100)
_UP = tl.constexpr(2.0**64)
_ROUNDING = tl.constexpr(1.5 * 2.0**23)
"""A float32 of less than 2^22 that has this added and taken away again is the nearest integer."""
_MARGIN = 1 - 2.0**-13
"""Of what is allowed: errors are measured in float32."""
_STEP = tl.constexpr(0.98 * 12**0.5)
"""Of the allowed error: the step of numbers that are evenly spread between two steps, less 2 %."""


class Digits(NamedTuple):
    """Rows [T, K] as integers."""

    codes: Tensor
    """int8 [2, T, K]: first digits, and second ones of rows that have them."""
    steps: Tensor
    """float32 [T]: what one is worth."""
    owners: Tensor
    """int32 [T]: which row is at a place."""
    marks: Tensor
    """int32 [1 + T/128 up, 1 + 2 K/128]: rows with one digit, rows with two; then, of each tile,
    how many blocks have second digits, which (in any order), and a mark for each that is one."""


@triton.jit
def _rounded(values):
    return (values + _ROUNDING) - _ROUNDING


@triton.jit
def _error(values):
    """What rounding does to them, squared."""
    left = values - _rounded(values)
    return left * left


@triton.jit
def _part(x, start, columns, larger, BLOCK: tl.constexpr):
    """Some of a row's numbers, [BLOCK]."""
    column = start + tl.arange(0, BLOCK)
    own = tl.load(x + column, mask=column < columns, other=0.0)
    return own.to(tl.float32) * larger, column


@triton.jit
def _list_blocks(listed, second, start, columns):
    """Lists the blocks in which a part of a row has a second digit; each once for its tile."""
    PART: tl.constexpr = second.shape[0]
    there = tl.max(tl.reshape(tl.abs(second), [PART // _WIDE, _WIDE]), 1) > 0
    block = start // _WIDE + tl.arange(0, PART // _WIDE)
    new = there & (tl.atomic_xchg(listed + 1 + columns // _WIDE + block, 1, mask=there) == 0)
    found = tl.atomic_add(listed + tl.zeros_like(block), 1, mask=new)
    tl.store(listed + 1 + found, block, mask=new)


@triton.jit
def _to_digits(codes, steps, owners, marks, x, allowed, tokens, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x += row.to(tl.int64) * columns
    none = tl.zeros([BLOCK], tl.float32)
    most = none
    for start in range(0, columns, BLOCK):
        own, _ = _part(x, start, columns, 1.0, BLOCK)
        most = tl.maximum(most, tl.abs(own))
    largest = tl.max(most, 0)
    # Of the smallest numbers, whose reciprocals would be infinite, 2^64 times as much.
    larger = tl.where(largest < _LEAST, _UP, 1.0)
    largest *= larger
    factor = tl.where(largest > 0, _LIMIT / largest, 0.0)
    squares = none
    errors = none
    for start in range(0, columns, BLOCK):
        own, _ = _part(x, start, columns, larger, BLOCK)
        own *= factor
        squares += own * own
        errors += _error(own)
    power = tl.sum(squares, 0)
    fails = tl.sum(errors, 0) > allowed * allowed * power
    if fails:
        finer = 1.0 / (_STEP * allowed * tl.sqrt(power / columns))
        errors = none
        for start in range(0, columns, BLOCK):
            own, _ = _part(x, start, columns, larger, BLOCK)
            errors += _error(own * factor * finer)
        # Half the step is near enough whatever the numbers are.
        coarse = tl.sum(errors, 0) > allowed * allowed * power * finer * finer
        finer = tl.where(coarse, 2 * finer, finer)
        factor *= finer
        largest /= finer
    before = tl.atomic_add(marks + fails.to(tl.int32), 1)
    place = tl.where(fails, tokens - 1 - before, before)
    # No number of a row that is not finite must pass for one.
    step = tl.where(power == power, largest / _LIMIT / larger, float("nan"))
    tl.store(steps + place, step)
    tl.store(owners + place, row)
    codes += place.to(tl.int64) * columns
    seconds = codes + tokens.to(tl.int64) * columns
    listed = marks + (1 + place // _TALL) * (1 + 2 * (columns // _WIDE))
    for start in range(0, columns, BLOCK):
        own, column = _part(x, start, columns, larger, BLOCK)
        whole = _rounded(own * factor)
        if fails:
            second = _rounded(whole * (1.0 / _SECOND))
            whole -= second * _SECOND
            tl.store(seconds + column, second.to(tl.int8), mask=column < columns)
            _list_blocks(listed, second, start, columns)
        tl.store(codes + column, whole.to(tl.int8), mask=column < columns)


_kernel = Kernel(_to_digits, grid="tokens", multiples_of_16=("columns",))


def fits(columns: int) -> bool:
    """Whether rows of so many columns can be brought into digits."""
    return columns % WIDE == 0 and columns <= MOST_COLUMNS


def to_digits(x: Tensor, max_error: float) -> Digits:
    """Rows of `x` [T, K], contiguous, on a card; KernelInputError if something does not fit."""
    tokens, columns = x.shape
    if not fits(columns) or max_error < LEAST_ERROR or not x.is_contiguous():
        raise KernelInputError(
            f"x is {tuple(x.shape)} and max_error {max_error}; columns must be a multiple of "
            f"{WIDE}, {MOST_COLUMNS} at most, x contiguous, and the error {LEAST_ERROR} at least"
        )
    made = Digits(
        torch.empty(2, tokens, columns, dtype=torch.int8, device=x.device),
        torch.empty(tokens, dtype=torch.float32, device=x.device),
        torch.empty(tokens, dtype=torch.int32, device=x.device),
        torch.zeros(
            1 + -(-tokens // TALL), 1 + 2 * (columns // WIDE), dtype=torch.int32, device=x.device
        ),
    )
    _kernel.launch(
        (tokens,),
        *(*made, x, max_error * _MARGIN, tokens, columns),
        **_program(columns),
    )
    return made


def _program(columns: int) -> dict[str, Any]:
    """Of long rows fewer run at once: what a row's program reads again should be in L1."""
    block, warps = (1024, 4) if columns <= 8192 else (4096, 8)
    return {"constants": {"BLOCK": block}, "warps": warps}


def variants() -> Iterator[Variant]:
    """What the bundle holds, for the cards that have a product."""
    types = ("*i8", "*fp32", "*i32", "*i32", "*bf16", "fp32", "i32", "i32")
    for columns in (1 << 13, 1 << 15):
        yield Variant(_kernel, types, **_program(columns), targets=HOPPER)
