"""Sums that are split over programs: their scratch memory, and how the programs meet.

A program stores its partial sums, then counts itself; the last one to arrive adds them all up (of
many the last of each group, then the last of those), in their fixed order, and sets the counter
back to zero. So results do not depend on which program was faster, which atomic additions of floats
would make them.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .errors import KernelInputError
from .formats import TILE

PARTIALS = 9 << 20
"""float32 values of partial sums, 36 MiB for each device: two tiles of 128 rows and 256 tokens for
each of an H100's 132 processors."""
COUNTERS = 1 << 14
GROUP = 8
"""Partial sums that are added first where all are added in groups."""
_GROUP = tl.constexpr(GROUP)
_PLAIN, _ADDED, _GATED = range(3)
"""What becomes of a sum: times the scale; the residual is added before; rows 2i and 2i + 1 are a
gate and what it lets through."""
_TILE = tl.constexpr(TILE)
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of a block's threads; the name before Triton 3.7 was another."""

_scratch: dict[torch.device, tuple[Tensor, Tensor]] = {}
_lock = threading.Lock()


def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """(partials float32 [PARTIALS], counters int32 [COUNTERS], all zero) of a device.

    Made at the first call, which must not be one that a CUDA graph records. Kernels that use them
    must run one after the other, as they do in one stream.
    """
    found = _scratch.get(device)
    if found is None:
        with _lock:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise KernelInputError(
                    "the first call of a kernel cannot be part of a CUDA graph; run it once before"
                )
            found = _scratch.setdefault(
                device,
                (
                    torch.empty(PARTIALS, dtype=torch.float32, device=device),
                    torch.zeros(COUNTERS, dtype=torch.int32, device=device),
                ),
            )
    return found


def in_groups(tokens: int, splits: int) -> bool:
    """Whether the last of each group of programs adds its sums, then the last of those all.

    Of four tokens there are registers for four partial sums at once: the last one of many programs
    would wait for the memory again and again. With few splits it would only cost registers.
    """
    # There are counters for all groups: only of few tiles so many sums have room in PARTIALS.
    return tokens == 4 and splits > 2 * GROUP


def epilogue_of(residual: Tensor | None, gated: bool) -> int:
    """What a kernel of tensor cores is to do with its sums."""
    return _GATED if gated else _PLAIN if residual is None else _ADDED


@triton.jit
def gated(gate, up):
    """gelu(gate) * up, by gelu's tanh form: 0.5 (1 + tanh z) is the logistic function of 2z."""
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * up / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def _finish(y, total, residual, added, scale, place, fits):
    """Stores (total + residual) * scale, rounded once; without the residual if `added` is 0."""
    total += tl.load(residual + place, mask=fits & (added > 0), other=0.0).to(tl.float32)
    tl.store(y + place, (total * scale).to(y.dtype.element_ty), mask=fits)


@triton.jit
def _finish_gated(y, total, scale, tokens, rows, TOKENS: tl.constexpr):
    """Stores gelu(row 2i) * row 2i + 1 of the sums [128, TOKENS] of a tile, times the scale."""
    gate, up = tl.split(tl.permute(tl.reshape(total, [_TILE // 2, 2, TOKENS]), (0, 2, 1)))
    pair = tl.program_id(0) * (_TILE // 2) + tl.arange(0, _TILE // 2)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    place = (tl.program_id(2) * TOKENS + token) * (rows // 2) + pair
    value = (gated(gate, up) * scale).to(y.dtype.element_ty)
    tl.store(y + place, value, mask=(pair < rows // 2) & (token < tokens))


@triton.jit
def _added_up(first, count, stride, TOKENS: tl.constexpr, WARPS: tl.constexpr):
    """The sum of `count` partial sums [128, TOKENS], `stride` apart, in their order."""
    # As many as there are registers for: they are waited for together.
    AT_ONCE: tl.constexpr = 8 if TOKENS == 1 or (TOKENS == 2 and WARPS > 1) else 4
    total = tl.zeros([_TILE, TOKENS], tl.float32)
    for begin in range(0, count, AT_ONCE):
        parts = ()
        for i in tl.static_range(AT_ONCE):
            there = begin + i < count
            part = tl.load(first + (begin + i) * stride, there, 0.0, cache_modifier=".cg")
            parts = parts + (part,)
        for i in tl.static_range(AT_ONCE):
            total += parts[i]
    return total


@triton.jit
def meet(
    y,
    total,
    residual,
    added,
    scale,
    partials,
    counters,
    tokens,
    rows,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    GROUPED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Adds the splits' sums `total` [128, TOKENS] and stores the rows of the program's tile."""
    tile = tl.program_id(0)
    copy = tl.program_id(2)
    splits = tl.num_programs(1)
    token = tl.arange(0, TOKENS)[None, :]
    row = tile * _TILE + tl.arange(0, _TILE)[:, None]
    fits = (row < rows) & (token < tokens)
    place = (copy * TOKENS + token) * rows + row
    last = splits == 1
    if splits > 1:
        area = tl.num_programs(0) * _TILE * TOKENS
        own = partials + copy * splits * area + tile * _TILE * TOKENS
        own += tl.arange(0, _TILE)[:, None] * TOKENS + token
        tl.store(own + tl.program_id(1) * area, total)
        tl.debug_barrier()
        counter = counters + copy * tl.num_programs(0) + tile
        if GROUPED:
            groups = tl.cdiv(splits, _GROUP)
            counter += (copy * tl.num_programs(0) + tile) * groups
            group = tl.program_id(1) // _GROUP
            members = tl.minimum(splits - group * _GROUP, _GROUP)
            arrived = tl.atomic_add(counter + 1 + group, 1, sem="acq_rel")
            if arrived == members - 1:
                first = own + group * _GROUP * area
                tl.store(first, _added_up(first, members, area, TOKENS, WARPS))
                tl.debug_barrier()
                tl.atomic_xchg(counter + 1 + group, 0, sem="relaxed")
                last = tl.atomic_add(counter, 1, sem="acq_rel") == groups - 1
                if last:
                    total = _added_up(own, groups, _GROUP * area, TOKENS, WARPS)
                    tl.atomic_xchg(counter, 0, sem="relaxed")
        else:
            last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
            if last:
                total = _added_up(own, splits, area, TOKENS, WARPS)
                tl.atomic_xchg(counter, 0, sem="relaxed")
    if last:
        if GATED:
            _finish_gated(y, total, scale, tokens, rows, TOKENS)
        else:
            _finish(y, total, residual, added, scale, place, fits)


@gluon.jit
def _pairs_last(values, VIEW: gl.constexpr):
    SHAPE: gl.constexpr = VIEW[0]
    ORDER: gl.constexpr = VIEW[1]
    return gl.permute(gl.reshape(values, SHAPE), [ORDER[0], ORDER[1], ORDER[2], ORDER[3]])


@gluon.jit
def _finish_distributed(
    y, total, residual, epilogue, scale, stop, rows, row, token, VIEW: gl.constexpr
):
    if epilogue == 2:
        gate, up = gl.split(_pairs_last(total, VIEW))
        none = gl.zeros_like(total).to(gl.int32)
        even, _ = gl.split(_pairs_last(row + none, VIEW))
        line, _ = gl.split(_pairs_last(token + none, VIEW))
        value = (gated(gate, up) * scale).to(y.dtype.element_ty)
        pair = line * (rows // 2) + even // 2
        gl.store(y + pair, value, mask=(line < stop) & (even < rows))
    else:
        place = token * rows + row
        fits = (token < stop) & (row < rows)
        _finish(y, total, residual, epilogue, scale, place, fits)


@gluon.jit
def meet_distributed(
    y,
    totals,
    residual,
    epilogue,
    scale,
    partials,
    counters,
    stop,
    rows,
    row,
    tokens,
    flats,
    VIEW: gl.constexpr,
    COUNT: gl.constexpr,
):
    """`meet` in Gluon, for COUNT tensors of sums of one shape, each with its tokens, before `stop`.

    Several small ones need fewer registers than one large. `flats` number the elements of all.
    VIEW is a shape and an order of its dimensions, by which the lowest bit of the row comes last.
    """
    AT_ONCE: gl.constexpr = 4 if totals[0].numel <= 4096 else 2
    splits = gl.num_programs(2)
    if splits == 1:
        for i in gl.static_range(COUNT):
            _finish_distributed(
                y, totals[i], residual, epilogue, scale, stop, rows, row, tokens[i], VIEW
            )
    else:
        program = gl.program_id(0) * gl.num_programs(1) + gl.program_id(1)
        area = gl.num_programs(0) * gl.num_programs(1) * (totals[0].numel * COUNT)
        own = partials + program * (totals[0].numel * COUNT)
        for i in gl.static_range(COUNT):
            gl.store(own + gl.program_id(2) * area + flats[i], totals[i])
        barrier()
        if gl.atomic_add(counters + program, 1, sem="acq_rel") == splits - 1:
            for i in gl.static_range(COUNT):
                total = gl.zeros_like(totals[i])
                for first in range(0, splits, AT_ONCE):
                    parts = ()
                    for j in gl.static_range(AT_ONCE):
                        place = own + (first + j) * area + flats[i]
                        there = first + j < splits
                        parts = parts + (gl.load(place, there, 0.0, cache_modifier=".cg"),)
                    for j in gl.static_range(AT_ONCE):
                        total += parts[j]
                _finish_distributed(
                    y, total, residual, epilogue, scale, stop, rows, row, tokens[i], VIEW
                )
            gl.atomic_xchg(counters + program, 0, sem="relaxed")
