"""Queries, keys and values of what a projection gave: each head normed, weighted and turned.

y = x / rms(x) * weight, turned by RoPE; values are neither weighted nor turned. In one pass, in
float32, rounded once: torch makes nine of it, most over float32.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching.launch import Kernel, Variant
from .launching.overlap import both_ways, overlap_options, overlaps_on, wait_in_turn

EACH, WARPS = 4, 4
"""Heads of a token that a program has."""
DIMS = (64, 128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _norm_heads(
    query,
    key,
    value,
    projected,
    weights,
    cosines,
    sines,
    heads,
    kv_heads,
    stored,
    stride,
    epsilon,
    DIM: tl.constexpr,
    EACH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_in_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * EACH + tl.arange(0, EACH))[:, None]
    column = tl.arange(0, DIM)[None, :]
    other = (column + DIM // 2) % DIM
    turned = head < heads + kv_heads
    there = head < heads + 2 * kv_heads
    # Values that have no projection of their own are the keys before their weight and turn.
    source = tl.where(head < stored, head, head - kv_heads)
    line = projected + (token * stored + source) * DIM
    own = tl.load(line + column, mask=there, other=0.0).to(tl.float32)
    partner = tl.load(line + other, mask=there, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(own * own, 1) / DIM + epsilon)
    row = tl.where(head < heads, 0, 1) * DIM
    own *= tl.load(weights + row + column, mask=turned, other=1.0).to(tl.float32)
    partner *= tl.load(weights + row + other, mask=turned, other=1.0).to(tl.float32)
    cosine = tl.load(cosines + token * stride + column)
    sine = tl.load(sines + token * stride + column)
    result = tl.where(turned, own * cosine + partner * sine, own) * factor[:, None]
    result = result.to(query.dtype.element_ty)
    tl.store(query + (token * heads + head) * DIM + column, result, mask=head < heads)
    kv_head = head - heads
    line = (token * kv_heads + kv_head) * DIM + column
    tl.store(key + line, result, mask=(kv_head >= 0) & turned)
    tl.store(value + line - kv_heads * DIM, result, mask=there & (head >= heads + kv_heads))


_kernel = Kernel(_norm_heads, grid="tokens, cdiv(heads + 2 kv_heads, EACH)")


def variants() -> Iterator[Variant]:
    """What the bundle holds."""
    types = (*["*bf16"] * 5, "*fp32", "*fp32", *["i32"] * 4, "fp32")
    for overlap, targets in both_ways():
        for dim in DIMS[2:]:
            constants = {"DIM": dim, "EACH": EACH, "OVERLAP": overlap}
            how = WARPS, 1, targets, overlap_options(overlap)
            yield Variant(_kernel, types, constants, *how)


def norm_heads(
    projected: Tensor,
    weights: Tensor,
    rotation: tuple[Tensor, Tensor],
    heads: int,
    kv_heads: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, heads, D], keys and values [T, kv_heads, D] of a layer, all on a card.

    Args:
        projected: [T, H, D], contiguous, of one of `DTYPES`, D of `DIMS`: heads of queries, then of
            keys, then of values, which are those of keys if there are no more.
        weights: [2, D] or flat, of q_norm and of k_norm, in the same dtype; [D] without keys.
        rotation: cosines and signed sines, float32 [T, 1, D], whose rows may lie equally apart.
        heads: of queries.
        kv_heads: of keys; 0 where another layer's are read.
        epsilon: of the norm.
    """
    tokens, stored, dim = projected.shape
    query, key, value = (
        torch.empty(tokens, count, dim, dtype=projected.dtype, device=projected.device)
        for count in (heads, kv_heads, kv_heads)
    )
    if tokens:
        cosines, sines = rotation
        overlap = overlaps_on(projected)
        _kernel.launch(
            (tokens, triton.cdiv(heads + 2 * kv_heads, EACH)),
            *(query, key, value, projected, weights, cosines, sines),
            *(heads, kv_heads, stored, cosines.stride(0), epsilon),
            constants={"DIM": dim, "EACH": EACH, "OVERLAP": overlap},
            warps=WARPS,
            stages=1,
            options=overlap_options(overlap),
        )
    return query, key, value
