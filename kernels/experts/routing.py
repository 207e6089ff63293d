"""What is around the products of experts: choosing them, rows by expert, and their weighted sum.

Three kernels where torch makes some twenty of it, each over a few kilobytes at one token: there
starting a kernel is all that it costs. As in `reference`, of bfloat16 or float16.

- `choose` has a program of one warp for each token. It takes the largest score so many times, as
  one integer maximum and one minimum across a warp are an instruction each; sorting all would be 28
  steps of 128 experts. Of equal scores the lowest expert comes first. T * E scores are read, and 12
  bytes written for each expert chosen.
- `dispatch` sorts by counting: each pair's place is the number of pairs that come before it, which
  its programs count for themselves, so nobody waits for anybody and the hidden row is copied by who
  has found its place. Reads and writes T * active rows of H numbers.
- `combine` has the rows of a token in flight together, T * active rows of H numbers, and writes T.

What it gave up: more than `MOST_PAIRS`, as counting grows with their square; products that read the
hidden rows where they are.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from ..launching.overlap import both_ways, overlap_options, overlaps_on, wait_in_turn

DTYPES = (torch.bfloat16, torch.float16)
MOST_EXPERTS = 1024
MOST_ACTIVE = 16
MOST_PAIRS = 1024
UNIT = 16
"""Rows are multiples of so many numbers."""
_FEWEST = 128
"""Experts that a program has room for at least."""
_PAIRS = (16, 128, MOST_PAIRS)
"""Pairs that a program has room for: those of a token or two, of some, and of most."""
_ACTIVE = (4, 8, MOST_ACTIVE)
_COPIED, _SUMMED = 1024, 256
"""Columns that a program of `dispatch` and of `combine` has."""
_COPYING = 4
"""Warps of `dispatch`; the others have one."""
_LEAST = tl.constexpr(-(1 << 31))
"""Below the key of any number."""


@triton.jit
def _key(bits):
    """int32 that are ordered as the float32 are whose bits these are; and the other way round."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _choose(
    weights,
    chosen,
    scores,
    scale,
    experts,
    active,
    EXPERTS: tl.constexpr,
    ACTIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_in_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    there = expert < experts
    score = tl.load(scores + token * experts + expert, mask=there, other=0.0).to(tl.float32)
    # Zeros are equal whatever their sign. As keys NaNs have an order too, so that each round finds
    # another expert, whatever the scores are.
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    left = tl.where(there, _key(bits), _LEAST)
    largest = _key(tl.max(left, 0)).to(tl.float32, bitcast=True)
    total = tl.sum(tl.where(there, tl.exp(score - largest), 0.0), 0)
    slot = tl.arange(0, ACTIVE)
    keys = tl.zeros([ACTIVE], tl.int32)
    found = tl.zeros([ACTIVE], tl.int32)
    for index in range(active):
        most = tl.max(left, 0)
        own = tl.min(tl.where(left == most, expert, EXPERTS), 0)
        keys = tl.where(slot == index, most, keys)
        found = tl.where(slot == index, own, found)
        left = tl.where(expert == own, _LEAST, left)
    taken = slot < active
    best = _key(keys).to(tl.float32, bitcast=True)
    share = tl.where(taken, tl.exp(best - largest) / total, 0.0)
    share = share / tl.sum(share, 0) * tl.load(scale + found, mask=taken, other=0.0).to(tl.float32)
    place = token * active + slot
    tl.store(weights + place, share, mask=taken)
    tl.store(chosen + place, found.to(tl.int64), mask=taken)


@triton.jit
def _dispatch(
    inputs,
    experts,
    back,
    hidden,
    chosen,
    pairs,
    active,
    width,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_in_turn(OVERLAP)
    pair = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = hidden + (pair // active).to(tl.int64) * width + column
    row = tl.load(source, mask=column < width, other=0.0)
    other = tl.arange(0, PAIRS)
    own = tl.load(chosen + pair)
    expert = tl.load(chosen + other, mask=other < pairs, other=0)
    before = (expert < own) | ((expert == own) & (other < pair))
    place = tl.sum((before & (other < pairs)).to(tl.int32), 0).to(tl.int64)
    tl.store(inputs + place * width + column, row, mask=column < width)
    if tl.program_id(1) == 0:
        tl.store(experts + place, own.to(tl.int32))
        tl.store(back + pair, place)


@triton.jit
def _combine(
    out,
    outputs,
    weights,
    back,
    active,
    width,
    ACTIVE: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_in_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < width
    total = tl.zeros([COLUMNS], tl.float32)
    for index in tl.static_range(ACTIVE):
        taken = index < active
        row = tl.load(back + token * active + index, mask=taken, other=0)
        weight = tl.load(weights + token * active + index, mask=taken, other=0.0)
        own = tl.load(outputs + row * width + column, mask=fits & taken, other=0.0)
        total += own.to(tl.float32) * weight
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=fits)


_chosen = Kernel(_choose, name="choose_experts", grid="tokens")
_dispatched = Kernel(
    _dispatch,
    name="dispatch_rows",
    grid="pairs, cdiv(width, COLUMNS)",
    multiples_of_16=("width",),
)
_combined = Kernel(
    _combine,
    name="combine_rows",
    grid="tokens, cdiv(width, COLUMNS)",
    multiples_of_16=("width",),
)


def variants() -> Iterator[Variant]:
    """What the bundle holds: up to 256 experts."""
    for overlap, targets in both_ways():
        own = {"OVERLAP": overlap}
        options = overlap_options(overlap)
        types: tuple[str, ...] = ("*fp32", "*i64", "*bf16", "*bf16", "i32", "i32")
        for experts in (_FEWEST, 2 * _FEWEST):
            constants = {"EXPERTS": experts, "ACTIVE": MOST_ACTIVE, **own}
            yield Variant(_chosen, types, constants, 1, 1, targets, options)
        types = ("*bf16", "*i32", "*i64", "*bf16", "*i64", "i32", "i32", "i32")
        for pairs in _PAIRS:
            constants = {"PAIRS": pairs, "COLUMNS": _COPIED, **own}
            yield Variant(_dispatched, types, constants, _COPYING, 1, targets, options)
        types = ("*bf16", "*bf16", "*fp32", "*i64", "i32", "i32")
        for active in _ACTIVE:
            constants = {"ACTIVE": active, "COLUMNS": _SUMMED, **own}
            yield Variant(_combined, types, constants, 1, 1, targets, options)


def choose(scores: Tensor, scale: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """As `reference.choose`; of equal scores those of the first experts are taken, in their order.

    `scores` and `scale` are contiguous and of one of `DTYPES`, E at most `MOST_EXPERTS`, `active`
    at most `MOST_ACTIVE`. Raises `KernelInputError` if something does not fit.
    """
    if scores.dim() != 2 or scale.shape != scores.shape[1:] or scale.dtype != scores.dtype:
        raise KernelInputError(
            f"scores are {scores.dtype} {tuple(scores.shape)} and the scale {scale.dtype} "
            f"{tuple(scale.shape)}; they must be [T, E] and [E] of one dtype"
        )
    tokens, experts = scores.shape
    if experts > MOST_EXPERTS or not 1 <= active <= min(experts, MOST_ACTIVE):
        raise KernelInputError(
            f"{active} of {experts} experts; it takes 1 to {MOST_ACTIVE} of up to {MOST_EXPERTS}"
        )
    _check(scores=scores, scale=scale)
    weights = torch.empty(tokens, active, dtype=torch.float32, device=scores.device)
    chosen = torch.empty(tokens, active, dtype=torch.int64, device=scores.device)
    room = max(_FEWEST, triton.next_power_of_2(experts))
    overlap = overlaps_on(scores)
    _chosen.launch(
        (tokens,),
        *(weights, chosen, scores, scale, experts, active),
        constants={"EXPERTS": room, "ACTIVE": MOST_ACTIVE, "OVERLAP": overlap},
        warps=1,
        stages=1,
        options=overlap_options(overlap),
    )
    return weights, chosen


def dispatch(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.dispatch`, of up to `MOST_PAIRS` pairs.

    `hidden` and `chosen` are contiguous, `hidden` of one of `DTYPES` and H a multiple of `UNIT`.
    Raises `KernelInputError` if something does not fit.
    """
    if chosen.dim() != 2 or chosen.dtype != torch.int64 or len(chosen) != len(hidden):
        raise KernelInputError(
            f"hidden is {tuple(hidden.shape)} and chosen {chosen.dtype} {tuple(chosen.shape)}; "
            "they must be [T, H] and int64 [T, active]"
        )
    pairs, active = chosen.numel(), chosen.shape[1]
    if pairs > MOST_PAIRS:
        raise KernelInputError(f"{pairs} pairs of tokens and experts; it takes {MOST_PAIRS}")
    _check(hidden=hidden, chosen=chosen)
    width = _width(hidden)
    inputs = torch.empty(pairs, width, dtype=hidden.dtype, device=hidden.device)
    experts = torch.empty(pairs, dtype=torch.int32, device=hidden.device)
    back = torch.empty_like(chosen)
    overlap = overlaps_on(hidden)
    _dispatched.launch(
        (pairs, triton.cdiv(width, _COPIED)),
        *(inputs, experts, back, hidden, chosen, pairs, active, width),
        constants={"PAIRS": _room(_PAIRS, pairs), "COLUMNS": _COPIED, "OVERLAP": overlap},
        warps=_COPYING,
        stages=1,
        options=overlap_options(overlap),
    )
    return inputs, experts, back


def combine(outputs: Tensor, weights: Tensor, back: Tensor) -> Tensor:
    """As `reference.combine`, of up to `MOST_ACTIVE` rows a token.

    All are contiguous, `outputs` of one of `DTYPES` and H a multiple of `UNIT`. Rows in `back` are
    not checked. Raises `KernelInputError` if something does not fit.
    """
    right = weights.dtype == torch.float32 and back.dtype == torch.int64
    if not right or weights.dim() != 2 or back.shape != weights.shape:
        raise KernelInputError(
            f"weights are {weights.dtype} {tuple(weights.shape)} and back {back.dtype} "
            f"{tuple(back.shape)}; they must be float32 and int64, both [T, active]"
        )
    tokens, active = weights.shape
    if active > MOST_ACTIVE or len(outputs) != tokens * active:
        raise KernelInputError(
            f"{len(outputs)} rows for {tokens} tokens of {active}; it takes {MOST_ACTIVE} a token"
        )
    _check(outputs=outputs, weights=weights, back=back)
    width = _width(outputs)
    out = torch.empty(tokens, width, dtype=outputs.dtype, device=outputs.device)
    overlap = overlaps_on(outputs)
    _combined.launch(
        (tokens, triton.cdiv(width, _SUMMED)),
        *(out, outputs, weights, back, active, width),
        constants={"ACTIVE": _room(_ACTIVE, active), "COLUMNS": _SUMMED, "OVERLAP": overlap},
        warps=1,
        stages=1,
        options=overlap_options(overlap),
    )
    return out


def _check(**named: Tensor) -> None:
    """Raises `KernelInputError` unless kernels take how all lie, and the dtype of the first."""
    (first, values), *_ = named.items()
    if values.dtype not in DTYPES:
        raise KernelInputError(f"{first} is {values.dtype}; it must be one of {DTYPES}")
    for name, tensor in named.items():
        if not tensor.is_contiguous() or tensor.device != values.device:
            raise KernelInputError(f"{name} must be contiguous, and on {values.device}")


def _width(rows: Tensor) -> int:
    if rows.dim() != 2 or rows.shape[1] % UNIT:
        raise KernelInputError(
            f"rows of {tuple(rows.shape)}; they must be [n, H], H a multiple of {UNIT}"
        )
    return rows.shape[1]


def _room(sizes: tuple[int, ...], needed: int) -> int:
    return next(size for size in sizes if size >= needed)
