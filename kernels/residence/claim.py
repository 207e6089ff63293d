"""One program that decides which expert gets which slot: no host waits for what it finds.

A layer's step claims the experts that its router has chosen: those in a slot are marked as used
now, each of the others takes the slot that is worth least among those that this step does not use
itself, and goes on the list for `fetch`. Claimed ahead, by prediction, the experts of the layer
that follows take slots in the same way, but none that the running layer uses, and count as used
only when they are. Decisions are those of `reference.claim`, whole numbers throughout.

It takes some 3 us of latency, and 1 us for each expert that is missing. What it gave up: more than
one program, so that 4,096 slots are looked through by one processor.
"""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelInputError
from ..launching.launch import Kernel, Variant
from .table import AHEAD, EMPTY, HITS, MISSES, MOST_SLOTS, SCAN, TAKEN, UNIT, USED, SlotTable

_UNIT, _EMPTY, _TAKEN = tl.constexpr(UNIT), tl.constexpr(EMPTY), tl.constexpr(TAKEN)
_MOST = tl.constexpr(MOST_SLOTS)
_HITS, _MISSES = tl.constexpr(HITS), tl.constexpr(MISSES)
_AHEAD, _USED = tl.constexpr(AHEAD), tl.constexpr(USED)
_PART, _WHOLE = map(tl.constexpr, SCAN)
_WARPS = 8
_FEWEST = 128, 1024
"""Experts and slots that a program has at least: fewer are not worth a program of their own."""
_BLOCKS = (16, 128)
"""Choices that are looked at together: those of a token or two, and of many."""


@triton.jit
def _reused(worth, time):
    """`table.reused`."""
    gap = tl.abs(worth - time)
    shift = tl.minimum(gap // _UNIT, 31)
    return tl.maximum(worth, time) + (tl.full(worth.shape, _UNIT, tl.int64) >> shift)


@triton.jit
def _claim(
    slot_of,
    owner,
    used,
    early,
    worth,
    clock,
    counts,
    fetches,
    chosen,
    choices,
    layer,
    experts,
    slots,
    rate,
    AHEAD: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    now = tl.load(clock)
    if not AHEAD:
        now += 1
    expert = tl.arange(0, EXPERTS)
    found = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, choices, BLOCK):
        place = start + tl.arange(0, BLOCK)
        own = tl.load(chosen + place, mask=place < choices, other=-1).to(tl.int32)
        found |= tl.max((own[:, None] == expert[None, :]).to(tl.int32), 0)
    needed = found > 0
    whole = layer * experts + expert
    slot = tl.load(slot_of + whole, mask=needed, other=-1)
    hit = needed & (slot >= 0)
    came_early = tl.load(early + slot, mask=hit, other=0)
    before = tl.load(worth + whole, mask=needed, other=0)
    scan = _WHOLE * tl.sum(found, 0) > _PART * experts
    missing = (needed & (slot < 0)).to(tl.int32)
    wanted = tl.sum(missing, 0)
    tl.debug_barrier()  # several threads read the same; none may be late and read what is stored
    tl.store(used + slot, tl.zeros([EXPERTS], tl.int64) + now, mask=hit)
    if not AHEAD:
        tl.store(clock, now)
        tl.store(early + slot, 0, mask=hit)
        tl.store(worth + whole, _reused(before, now * rate), mask=needed & (scan == 0))
        tl.store(counts + _HITS, tl.load(counts + _HITS) + tl.sum(hit.to(tl.int32), 0))
        tl.store(counts + _MISSES, tl.load(counts + _MISSES) + wanted)
        tl.store(counts + _USED, tl.load(counts + _USED) + tl.sum(came_early, 0))
    tl.debug_barrier()  # all that was stored is read below by other threads
    place = tl.arange(0, SLOTS)
    fits = place < slots
    holder = tl.load(owner + place, mask=fits, other=-1)
    last = tl.load(used + place, mask=fits, other=0)
    value = tl.load(worth + holder, mask=holder >= 0, other=_EMPTY)
    key = tl.where(fits & (last != now), value * _MOST + place, _TAKEN)
    if AHEAD:
        wanted = tl.minimum(wanted, tl.sum((key < _TAKEN).to(tl.int32), 0))
        tl.store(counts + _AHEAD, tl.load(counts + _AHEAD) + wanted)
    for index in range(wanted):
        own = tl.min(tl.where(missing > 0, expert, EXPERTS), 0)
        missing = tl.where(expert == own, 0, missing)
        least = tl.min(key, 0)
        key = tl.where(key == least, _TAKEN, key)
        into = (least & (_MOST - 1)).to(tl.int32)
        goes = tl.load(owner + into)
        tl.store(slot_of + goes, -1, mask=goes >= 0)
        comes = layer * experts + own
        tl.store(slot_of + comes, into)
        tl.store(owner + into, comes)
        tl.store(used + into, now)
        tl.store(early + into, 1 if AHEAD else 0)
        tl.store(fetches + 1 + index, comes)
        tl.store(fetches + 1 + experts + index, into)
    tl.store(fetches, wanted)


_claimed = Kernel(_claim, name="claim_slots", grid="1")


def _constants(experts: int, slots: int, choices: int, ahead: bool) -> dict[str, object]:
    block = next((each for each in _BLOCKS if each >= choices), _BLOCKS[-1])
    return {
        **{"AHEAD": ahead, "EXPERTS": max(_FEWEST[0], triton.next_power_of_2(experts))},
        **{"SLOTS": max(_FEWEST[1], triton.next_power_of_2(slots)), "BLOCK": block},
    }


def variants() -> Iterator[Variant]:
    """What the bundle holds: up to 128 experts a layer, and 4,096 slots."""
    state = ("*i32", "*i32", "*i64", "*i32", "*i64", "*i64", "*i64", "*i32")
    types = (*state, "*i64", *["i32"] * 5)
    for ahead, slots, block in product((False, True), (1024, 2048, 4096), _BLOCKS):
        yield Variant(_claimed, types, _constants(128, slots, block, ahead), _WARPS, 1)


def claim(table: SlotTable, layer: int, chosen: Tensor, ahead: bool = False) -> None:
    """Gives the experts `chosen` (int64, any shape and number) of a layer their slots.

    Args:
        table: is changed; its `fetches` are what then has to come.
        layer: which of the table's.
        chosen: numbers below `table.experts`, which is not checked.
        ahead: by prediction, while the layer that claimed last still runs: experts for which there
            are no slots then are left out.

    Raises KernelInputError if `chosen` is something else.
    """
    if not chosen.is_contiguous() or not 0 <= layer < table.layers:
        raise KernelInputError(f"layer {layer} of {table.layers}; `chosen` must be contiguous")
    _claimed.launch(
        (1,),
        *(table.slot_of, table.owner, table.used, table.early, table.worth, table.clock),
        *(table.counts, table.fetches, chosen, chosen.numel(), layer, table.experts),
        *(table.slots, table.rate),
        constants=_constants(table.experts, table.slots, chosen.numel(), ahead),
        warps=_WARPS,
        stages=1,
    )
