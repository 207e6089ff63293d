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


@triton.jit
def finish(y, total, residual, added, scale, place, fits):
    """Stores (total + residual) * scale, rounded once; without the residual if `added` is 0."""
    total += tl.load(residual + place, mask=fits & (added > 0), other=0.0).to(tl.float32)
    tl.store(y + place, (total * scale).to(y.dtype.element_ty), mask=fits)


@triton.jit
def meet(y, total, residual, added, scale, partials, counters, tokens, rows, TOKENS: tl.constexpr):
    """Adds the splits' sums `total` [128, TOKENS] and stores the rows of the program's tile."""
    tile = tl.program_id(0)
    copy = tl.program_id(2)
    splits = tl.num_programs(1)
    token = tl.arange(0, TOKENS)[None, :]
    row = tile * _TILE + tl.arange(0, _TILE)[:, None]
    fits = (row < rows) & (token < tokens)
    place = (copy * TOKENS + token) * rows + row
    if splits == 1:
        finish(y, total, residual, added, scale, place, fits)
    else:
        area = tl.num_programs(0) * _TILE * TOKENS
        own = partials + copy * splits * area + tile * _TILE * TOKENS
        own += tl.arange(0, _TILE)[:, None] * TOKENS + token
        tl.store(own + tl.program_id(1) * area, total)
        tl.debug_barrier()
        counter = counters + copy * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            total = tl.zeros([_TILE, TOKENS], tl.float32)
            for split in range(splits):
                total += tl.load(own + split * area, cache_modifier=".cg")
            finish(y, total, residual, added, scale, place, fits)
            tl.atomic_xchg(counter, 0, sem="relaxed")


@gluon.jit
def _finish_distributed(y, total, residual, added, scale, place, fits):
    total += gl.load(residual + place, mask=fits & (added > 0), other=0.0).to(gl.float32)
    gl.store(y + place, (total * scale).to(y.dtype.element_ty), mask=fits)


@gluon.jit
def meet_distributed(
    y, total, residual, added, scale, partials, counters, tokens, rows, row, token, flat
):
    """`meet` in Gluon, for sums of any shape: `flat` numbers the elements of a program's."""
    place = token * rows + row
    fits = (token < tokens) & (row < rows)
    splits = gl.num_programs(2)
    if splits == 1:
        _finish_distributed(y, total, residual, added, scale, place, fits)
    else:
        program = gl.program_id(0) * gl.num_programs(1) + gl.program_id(1)
        area = gl.num_programs(0) * gl.num_programs(1) * total.numel
        own = partials + program * total.numel + flat
        gl.store(own + gl.program_id(2) * area, total)
        barrier()
        if gl.atomic_add(counters + program, 1, sem="acq_rel") == splits - 1:
            total = gl.zeros_like(total)
            for split in range(splits):
                total += gl.load(own + split * area, cache_modifier=".cg")
            _finish_distributed(y, total, residual, added, scale, place, fits)
            gl.atomic_xchg(counters + program, 0, sem="relaxed")
