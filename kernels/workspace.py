"""Sums that are split over programs: their scratch memory, and how the programs meet.

A program stores its partial sums, then counts itself; the last one to arrive adds them all up, in
their fixed order, and sets the counter back to zero. So results do not depend on which program was
faster, which atomic additions of floats would make them.
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

PARTIALS = 8 << 20
"""float32 values of partial sums: 32 MiB for each device."""
COUNTERS = 1 << 14
PLAIN, ADDED, GATED = range(3)
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


def epilogue_of(residual: Tensor | None, gated: bool) -> int:
    """What a kernel is to do with its sums."""
    return GATED if gated else PLAIN if residual is None else ADDED


@triton.jit
def gated(gate, up):
    """gelu(gate) * up, by gelu's tanh form: 0.5 (1 + tanh z) is the logistic function of 2z."""
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * up / (1.0 + tl.exp(-2.0 * z))


@triton.jit
def _finish(y, total, residual, epilogue, scale, place, fits):
    """Stores (total + residual) * scale, rounded once; without the residual unless it is added."""
    total += tl.load(residual + place, mask=fits & (epilogue == 1), other=0.0).to(tl.float32)
    tl.store(y + place, (total * scale).to(y.dtype.element_ty), mask=fits)


@triton.jit
def _finish_tile(y, total, residual, epilogue, scale, tokens, rows, TOKENS: tl.constexpr):
    """`_finish` for the sums [128, TOKENS] of a tile, or their gated product if that is asked."""
    tile = tl.program_id(0)
    token = tl.arange(0, TOKENS)[None, :]
    line = tl.program_id(2) * TOKENS + token
    if epilogue == 2:
        gate, up = tl.split(tl.permute(tl.reshape(total, [_TILE // 2, 2, TOKENS]), (0, 2, 1)))
        pair = tile * (_TILE // 2) + tl.arange(0, _TILE // 2)[:, None]
        value = (gated(gate, up) * scale).to(y.dtype.element_ty)
        there = (pair < rows // 2) & (token < tokens)
        tl.store(y + line * (rows // 2) + pair, value, mask=there)
    else:
        row = tile * _TILE + tl.arange(0, _TILE)[:, None]
        fits = (row < rows) & (token < tokens)
        _finish(y, total, residual, epilogue, scale, line * rows + row, fits)


@triton.jit
def meet(
    y, total, residual, epilogue, scale, partials, counters, tokens, rows, TOKENS: tl.constexpr
):
    """Adds the splits' sums `total` [128, TOKENS] and stores the rows of the program's tile."""
    tile = tl.program_id(0)
    copy = tl.program_id(2)
    splits = tl.num_programs(1)
    if splits == 1:
        _finish_tile(y, total, residual, epilogue, scale, tokens, rows, TOKENS)
    else:
        area = tl.num_programs(0) * _TILE * TOKENS
        own = partials + copy * splits * area + tile * _TILE * TOKENS
        own += tl.arange(0, _TILE)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(own + tl.program_id(1) * area, total)
        tl.debug_barrier()
        counter = counters + copy * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            total = tl.zeros([_TILE, TOKENS], tl.float32)
            for split in range(splits):
                total += tl.load(own + split * area, cache_modifier=".cg")
            _finish_tile(y, total, residual, epilogue, scale, tokens, rows, TOKENS)
            tl.atomic_xchg(counter, 0, sem="relaxed")


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
                for split in range(splits):
                    total += gl.load(own + split * area + flats[i], cache_modifier=".cg")
                _finish_distributed(
                    y, total, residual, epilogue, scale, stop, rows, row, tokens[i], VIEW
                )
            gl.atomic_xchg(counters + program, 0, sem="relaxed")
