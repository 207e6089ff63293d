"""Writing a plain paged cache: keys and values of new tokens, copied to their places in one launch.

A program copies a part of one token, of its key and of its value. A token whose slot is negative is
left out: a recorded step has the same number of rows every time, and those that no sequence fills
must leave no trace. Slot, key and value are fetched together, and only storing waits for the slot:
a decoding step has so few tokens that waiting is all its time.

Bytes moved for each number: its own in and out again, and 8 for a token's slot. torch's
`index_copy_` moves the same in two launches, and takes no slot for "nowhere".

What it gave up: parts that fit their token. All have `BLOCK` numbers, so that one program serves
every shape; the last of a token, or all of a tiny one, is in part idle.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from ..launching.overlap import both_ways, overlap_options, overlaps_on, wait_in_turn
from ..launching.variant import ALIGNMENT
from .cache import DTYPES, misfit

BLOCK = 1024
"""Numbers of a program: 16 bytes of bfloat16 for each of its threads."""
UNIT = 8
"""Numbers that are moved together, where tokens and the room between them are multiples of it."""


@triton.jit
def _write(
    keys,
    values,
    key,
    value,
    slots,
    units,
    key_units,
    value_units,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_in_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = place < units * UNIT
    slot = tl.load(slots + token)
    own_key = tl.load(key + token * key_units * UNIT + place, mask=within)
    own_value = tl.load(value + token * value_units * UNIT + place, mask=within)
    stored = within & (slot >= 0)
    at = slot * units * UNIT + place
    tl.store(keys + at, own_key, mask=stored)
    tl.store(values + at, own_value, mask=stored)


_written = Kernel(_write, name="kv_write", grid="tokens, cdiv(units * UNIT, BLOCK)")


def variants() -> Iterator[Variant]:
    """What the bundle holds: any tokens of a multiple of 8 numbers, in bfloat16."""
    types = (*["*bf16"] * 4, "*i64", *["i32"] * 3)
    for overlap, targets in both_ways():
        constants = {"BLOCK": BLOCK, "UNIT": UNIT, "OVERLAP": overlap}
        options = overlap_options(overlap)
        yield Variant(_written, types, constants, targets=targets, options=options)


def write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """As the plain reference's `write_kv`: nothing is stored of a token whose slot is negative.

    Args:
        key: [T, kv_heads, head_dim] in the caches' dtype; its tokens may lie apart.
        value: likewise.
        keys: [pages, page_size, kv_heads, head_dim], contiguous, one of `DTYPES`.
        values: likewise.
        slots: int64 [T]: page * page_size + place in the page, all different, or negative.

    KernelInputError for anything else, before anything is written.
    """
    fault = _fault(key, value, keys, values, slots)
    if fault:
        raise KernelInputError(f"writing keys and values: {fault}")
    key, value, slots = (_readable(own) for own in (key, value, slots))
    numbers = math.prod(keys.shape[2:])
    apart = key.stride(0), value.stride(0)
    unit, overlap = math.gcd(UNIT, numbers, *apart), overlaps_on(keys)
    _written.launch(
        (len(slots), triton.cdiv(numbers, BLOCK)),
        *(keys, values, key, value, slots),
        *(each // unit for each in (numbers, *apart)),
        constants={"BLOCK": BLOCK, "UNIT": unit, "OVERLAP": overlap},
        options=overlap_options(overlap),
    )


def _fault(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> str:
    """What is wrong with the tensors, or nothing."""
    device, dtype = keys.device, keys.dtype
    if keys.dim() != 4 or dtype not in DTYPES:
        return (
            f"keys are {dtype} {tuple(keys.shape)}; not bfloat16, float16 or float32 "
            "[pages, page_size, kv_heads, head_dim]"
        )
    shape = (slots.numel(), *keys.shape[2:])
    for name, own in (("key", key), ("value", value)):
        if own.dtype != dtype or own.shape != shape or own.device != device:
            return (
                f"{name} is {own.dtype} {tuple(own.shape)} on {own.device}; it must be "
                f"{dtype} {shape} on {device}"
            )
    return misfit(
        device,
        ("keys", keys, dtype, keys.shape),
        ("values", values, dtype, keys.shape),
        ("slots", slots, torch.int64, shape[:1]),
    )


def _readable(own: Tensor) -> Tensor:
    """The same, copied where it begins between addresses that kernels take, or a token has gaps."""
    if own.data_ptr() % ALIGNMENT or not own[:1].is_contiguous():
        return own.clone(memory_format=torch.contiguous_format)
    return own
