"""RMS norms and the sums around them: what stands between two products of a layer, in one kernel.

sum = (residual + norm(branch) [+ norm(branch)]) * scale, each norm x / rms(x) * weight; then norms
of that sum, each by a weight of its own. Every step is computed in float32 and rounded as if it
stood alone, so only the number of kernels differs: three in a dense layer, where torch makes seven.

A program has a whole row and keeps it in registers. It reads weights, which nobody writes, before
the kernel in front of it has ended. Bytes moved for each number and row: two for each operand and
each result in bfloat16; weights come from the L2 cache.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .errors import KernelInputError
from .launching.launch import Kernel, Variant
from .launching.overlap import both_ways, overlap_options, overlaps_on, wait_in_turn

DTYPES = (torch.bfloat16, torch.float16)
MOST = 16384
"""Numbers of a row."""
UNIT = 8
"""Numbers that are moved together, where a row is a multiple of it: 16 bytes."""
SHIPPED = (5376, 3840, 1536, 256)
"""Sizes that the bundle is made for, and with each all between the same powers of two."""


@triton.jit
def _normed(x, weight, size, epsilon, element: tl.constexpr):
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + epsilon)
    return (x * factor * weight).to(element).to(tl.float32)


@triton.jit
def _row(start, column, there):
    return tl.load(start + column, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _normed_sum(
    branch,
    more_branch,
    residual,
    out,
    following,
    more_following,
    weight,
    more_weight,
    scale,
    following_weight,
    more_following_weight,
    units,
    epsilon,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    element: tl.constexpr = branch.dtype.element_ty
    size = units * UNIT
    column = tl.arange(0, BLOCK)
    there = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    if weight is not None:
        by = _row(weight, column, there)
    if more_weight is not None:
        more_by = _row(more_weight, column, there)
    if following_weight is not None:
        after = _row(following_weight, column, there)
    if more_following_weight is not None:
        more_after = _row(more_following_weight, column, there)
    wait_in_turn(OVERLAP)
    total = _row(branch, at, there)
    if weight is not None:
        total = _normed(total, by, size, epsilon, element)
    if more_branch is not None:
        total += _normed(_row(more_branch, at, there), more_by, size, epsilon, element)
        total = total.to(element).to(tl.float32)
    if residual is not None:
        total = (_row(residual, at, there) + total).to(element).to(tl.float32)
    if scale is not None:
        total = (total * tl.load(scale).to(tl.float32)).to(element).to(tl.float32)
    if out is not None:
        tl.store(out + at, total.to(element), mask=there)
    if following is not None:
        result = _normed(total, after, size, epsilon, element)
        tl.store(following + at, result.to(element), mask=there)
    if more_following is not None:
        result = _normed(total, more_after, size, epsilon, element)
        tl.store(more_following + at, result.to(element), mask=there)


_kernel = Kernel(_normed_sum, grid="rows")


def variants() -> Iterator[Variant]:
    """What the bundle holds: norms alone, branches joined to a residual, two branches summed."""
    for overlap, targets in both_ways():
        for block in sorted({_block(size) for size in SHIPPED}):
            for given in _CASES:
                types = (*("*bf16" if each else "none" for each in given), "i32", "fp32")
                constants = {"BLOCK": block, "UNIT": UNIT, "OVERLAP": overlap}
                how = _warps(block), 1, targets, overlap_options(overlap)
                yield Variant(_kernel, types, constants, *how)


def _given(branches: int, residual: int, scale: int, following: int) -> tuple[bool, ...]:
    """Which of the kernel's pointers there are, as layers call it."""
    first, second = following > 0, following > 1
    more = branches > 1
    ahead = (True, more, bool(residual), branches > 0, first, second)
    return (*ahead, branches > 0, more, bool(scale), first, second)


_CASES = (
    _given(0, 0, 0, 1),
    *(_given(1, 1, 0, following) for following in (0, 1, 2)),
    _given(1, 1, 1, 0),
    _given(2, 0, 0, 0),
)


def norms(x: Tensor, weights: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """x / rms(x) * weight for each weight [size]; see `normed_sum` for `x` [..., size]."""
    return _launched([(x, None)], None, None, weights, epsilon)


def normed_sum(
    branches: Sequence[tuple[Tensor, Tensor]],
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    following: Sequence[Tensor] = (),
    *,
    epsilon: float,
) -> list[Tensor]:
    """The sum, then each norm of it.

    Args:
        branches: one or two, each [..., size] with the weight [size] of its norm.
        residual: [..., size], which is added; None for nothing.
        scale: [1], what the sum is multiplied by; None for nothing.
        following: up to two weights [size] of norms of the sum.
        epsilon: of all norms.

    All are contiguous, of one of `DTYPES`, on one card, size up to `MOST`. Raises KernelInputError
    for anything else.
    """
    return _launched(branches, residual, scale, following, epsilon)


def _launched(
    branches: Sequence[tuple[Tensor, Tensor | None]],
    residual: Tensor | None,
    scale: Tensor | None,
    following: Sequence[Tensor],
    epsilon: float,
) -> list[Tensor]:
    fault = _fault(branches, residual, scale, following)
    if fault:
        raise KernelInputError(f"norms and sums: {fault}")
    (branch, weight), (more, more_weight) = _two(branches, (None, None))
    size, summed = branch.shape[-1], weight is not None
    results = [torch.empty_like(branch) for _ in range(summed + len(following))]
    if branch.numel():
        overlap, block, unit = overlaps_on(branch), _block(size), math.gcd(UNIT, size)
        _kernel.launch(
            (branch.numel() // size,),
            *(branch, more, residual, results[0] if summed else None),
            *_two(results[summed:], None),
            *(weight, more_weight, scale, *_two(following, None), size // unit, epsilon),
            constants={"BLOCK": block, "UNIT": unit, "OVERLAP": overlap},
            warps=_warps(block),
            stages=1,
            options=overlap_options(overlap),
        )
    return results


def _two(given: Sequence[Any], nothing: Any) -> tuple[Any, Any]:
    """The first and the second, as far as there are any."""
    first, second = (*given, nothing, nothing)[:2]
    return first, second


def _fault(
    branches: Sequence[tuple[Tensor, Tensor | None]],
    residual: Tensor | None,
    scale: Tensor | None,
    following: Sequence[Tensor],
) -> str:
    """What is wrong with the arguments, or nothing."""
    if not 1 <= len(branches) <= 2 or len(following) > 2:
        return f"{len(branches)} branches and {len(following)} norms; it takes 1 or 2, and up to 2"
    like = branches[0][0]
    if not like.dim() or not 1 <= like.shape[-1] <= MOST or like.dtype not in DTYPES:
        return f"a branch is {like.dtype} {tuple(like.shape)}; not one of {DTYPES}, up to {MOST}"
    size = like.shape[-1:]
    wanted = [(own, like.shape) for own, _ in branches]
    wanted += [(own, size) for own in (*(by for _, by in branches), *following) if own is not None]
    wanted += [] if residual is None else [(residual, like.shape)]
    wanted += [] if scale is None else [(scale, torch.Size((1,)))]
    for own, shape in wanted:
        if own.shape != shape or own.dtype != like.dtype or own.device != like.device:
            return (
                f"there is {own.dtype} {tuple(own.shape)} on {own.device}; it must be "
                f"{like.dtype} {tuple(shape)} on {like.device}"
            )
        if not own.is_contiguous():
            return f"{tuple(own.shape)} must be contiguous"
    return ""


def _block(size: int) -> int:
    return max(32, 1 << (size - 1).bit_length())


def _warps(block: int) -> int:
    """Of 16 numbers a thread, as one row alone has nothing else to hide its latency."""
    return min(max(block // 512, 1), 16)
