"""Attention of many queries of one sequence: out[i, h] = softmax(query[i, h] key^T) value, scale 1.

Query i sees key j if offset + i - window < j <= offset + i. Scores stay on the processor (flash
attention: Dao et al. 2022, arXiv:2205.14135): a program has BLOCK queries of one head, and takes
TILE keys a step, with a running maximum and sum in float32. Steps that all of its queries see, or
none, need no mask, or are left out. Work is 4 head_dim operations for each pair of query and key
that see each other, which is what bounds it from some hundred queries on; all heads of a group read
the same keys and values, most of them from the L2 cache.

Heads of 512 numbers have a program of their own on Hopper (`prefill_wide`).

Probabilities are rounded to the values' 16 bits. It gave up several sequences at once, and tensor
descriptors, which are a card's own and would have to be made for each launch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from ..launching.targets import ALL, KIB, Target, target_of
from .prefill_wide import prefill_wide, takes
from .splits import LOG2E

EVERYTHING = 1 << 30
"""The window of layers without one."""
_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _rows(place, row, low, last, DIM: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Rows of DIM numbers, as COLUMNS; if MASKED, zeros before row `low` and from `last` on."""
    column = tl.arange(0, COLUMNS)
    place += row.to(tl.int64)[:, None] * DIM + column[None, :]
    if MASKED:
        there = (row >= low) & (row < last)
        found = tl.load(place, there[:, None] & (column < DIM)[None, :], 0.0)
    elif DIM < COLUMNS:
        found = tl.load(place, (column < DIM)[None, :], 0.0)
    else:
        found = tl.load(place)
    return found


@triton.jit
def _attend(
    total,
    largest,
    share,
    queries,
    key,
    value,
    position,
    first,
    end,
    low,
    last,
    window,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds keys `first` to `end`; if MASKED, those from `low` to `last` that a query sees.

    What no query of the program sees is not read: it may be no number.
    """
    for start in range(first, end, TILE):
        row = start + tl.arange(0, TILE)
        scores = tl.dot(queries, tl.trans(_rows(key, row, low, last, DIM, COLUMNS, MASKED)))
        if MASKED:
            seen = (row[None, :] <= position[:, None]) & (row[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1) * LOG2E)
        # A row may see none of the keys so far.
        base = tl.where(new == -float("inf"), 0.0, new) if MASKED else new
        old = tl.exp2(largest - base)
        shares = tl.exp2(scores * LOG2E - base[:, None])
        share = share * old + tl.sum(shares, 1)
        own = _rows(value, row, low, last, DIM, COLUMNS, MASKED)
        total = tl.dot(shares.to(own.dtype), own, total * old[:, None])
        largest = new
    return total, largest, share


@triton.jit
def _prefill(
    out,
    query,
    key,
    value,
    queries,
    keys,
    heads,
    group,
    offset,
    window,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    # The last queries see most keys: they begin first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0)
    start = block * BLOCK
    row = start + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    position = offset + row
    place = (row.to(tl.int64) * heads + head)[:, None] * DIM + column[None, :]
    inside = (row < queries)[:, None] & (column < DIM)[None, :]
    own = tl.load(query + place, mask=inside, other=0.0)
    key += (head // group).to(tl.int64) * keys * DIM
    value += (head // group).to(tl.int64) * keys * DIM

    # Keys that any query sees, and steps of keys that all see.
    low = tl.maximum(offset + start - window + 1, 0)
    last = offset + tl.minimum(start + BLOCK, queries)
    first = low // TILE * TILE
    whole_last = tl.maximum((offset + start + 1) // TILE * TILE, first)
    whole_first = tl.maximum((last - window + TILE - 1) // TILE * TILE, first)
    whole_first = tl.minimum(whole_first, whole_last)

    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    share = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            begin, end = first, whole_first
        elif part == 1:
            begin, end = whole_first, whole_last
        else:
            begin, end = whole_last, last
        total, largest, share = _attend(
            *(total, largest, share, own, key, value, position, begin, end, low, last, window),
            *(DIM, COLUMNS, TILE, part != 1),
        )
    total = total / share[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


_kernel = Kernel(_prefill, grid="heads, cdiv(queries, BLOCK)")


class Plan(NamedTuple):
    """How a program is made."""

    block: int
    """Queries."""
    tile: int
    """Keys of a step."""
    warps: int
    stages: int


def plan_of(dim: int, target: Target | None) -> Plan:
    """For heads of `dim` numbers; None is the interpreter."""
    if target is None:
        return Plan(16, 32, 4, 1)
    columns = _columns(dim)
    if target.vendor == "amd":
        return Plan(64, 32, 4 if columns <= 128 else 8, 1)
    if target.shared_memory > 200 * KIB:
        return Plan(64, 32, 8, 2) if columns > 256 else Plan(128, 64, 8, 2)
    if target.shared_memory > 128 * KIB:
        return Plan(64, 32, 8, 1) if columns > 256 else Plan(128, 32, 8, 2)
    return Plan(32, 16, 8, 1) if columns > 256 else Plan(64, 32, 4, 2)


def variants() -> Iterator[Variant]:
    """What the bundle holds: bfloat16 heads of usual sizes."""
    types = (*["*bf16"] * 4, *["i32"] * 6)
    for dim in (64, 128, 256, 512):
        plans: dict[Plan, list[Target]] = {}
        for target in ALL:
            plans.setdefault(plan_of(dim, target), []).append(target)
        for plan, targets in plans.items():
            yield Variant(
                _kernel, types, _constants(dim, plan), plan.warps, plan.stages, tuple(targets)
            )


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offset: int,
    window: int | None,
    out: Tensor,
) -> None:
    """Attention of a chunk of L queries over the S keys of its sequence.

    Args:
        query: [L, heads, head_dim], bfloat16 or float16, contiguous, as all of them.
        key: [kv_heads, S, head_dim]; head h reads h // (heads / kv_heads).
        value: like `key`.
        offset: the first query's own key; offset + L is S at most.
        window: how many keys a query sees at most; None for all before it.
        out: like `query`; written.

    Raises KernelInputError for what does not fit; nothing was launched then.
    """
    fault = _misfit(query, key, value, offset, window, out)
    if fault:
        raise KernelInputError(f"prefill attention: {fault}")
    queries, heads, dim = query.shape
    kv_heads, keys, _ = key.shape
    target = target_of(query.get_device()) if query.is_cuda else None
    if takes(query, offset + queries, window, target):
        return prefill_wide(query, key, value, offset, out)
    plan = plan_of(dim, target)
    _kernel.launch(
        (heads, -(-queries // plan.block)),
        *(out, query, key, value, queries, keys, heads, heads // kv_heads),
        *(offset, window or EVERYTHING),
        constants=_constants(dim, plan),
        warps=plan.warps,
        stages=plan.stages,
    )


def _columns(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _constants(dim: int, plan: Plan) -> dict[str, Any]:
    return {"DIM": dim, "COLUMNS": _columns(dim), "BLOCK": plan.block, "TILE": plan.tile}


def _misfit(
    query: Tensor, key: Tensor, value: Tensor, offset: int, window: int | None, out: Tensor
) -> str:
    """What is wrong with the arguments, or nothing."""
    if query.dim() != 3 or query.dtype not in _DTYPES:
        return f"query is {query.dtype} {tuple(query.shape)}, not 16 bit [L, heads, head_dim]"
    queries, heads, dim = query.shape
    if key.dim() != 3 or key.shape[2] != dim or heads % max(1, key.shape[0]):
        return f"key is {tuple(key.shape)}; it must be [kv_heads, S, {dim}], {heads} heads sharing"
    if value.shape != key.shape or out.shape != query.shape:
        return f"value is {tuple(value.shape)}, out {tuple(out.shape)}; like key and like query"
    if not 0 <= offset <= key.shape[1] - queries:
        return f"{queries} queries from key {offset} on do not fit {key.shape[1]} keys"
    if window is not None and window < 1:
        return f"the window is {window}"
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            return f"{name} is {tensor.dtype} on {tensor.device}, the query is not"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return ""
