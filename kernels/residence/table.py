"""Which experts lie in which slots: the tables that `claim` keeps, on the device that decides.

All layers share the slots. An expert is worth the more the more often and the more lately it was
used: the base-2 logarithm of the sum of 2^(when / half-life) over its uses (LRFU, Lee et al. 2001),
in whole numbers of 1/65,536, so that processors of every make decide alike. A short half-life is
LRU, a long one LFU; what is not in a slot keeps its worth too.

A step that needs nearly all experts of a layer, as a long prompt's does, says nothing about which
are worth more, and leaves worths as they are. So what it brings is the first to go again, and what
decoding had in its slots stays: of a scan of more layers than there is room for, LRU would find
nothing (research: Belady on a cyclic scan).

What it gave up: a worth by bytes (experts have one size) and by how soon a layer runs again.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..errors import KernelInputError

UNIT = 1 << 16
"""One half-life."""
NEVER = -(1 << 30)
"""The worth of what was never used."""
EMPTY = -(1 << 40)
"""The worth of a slot in which nothing lies: it goes first."""
SCAN = 3, 4
"""The part of a layer's experts above which a step is a scan."""
TAKEN = 1 << 62
"""More than the key of any slot that may be had."""
MOST_SLOTS = 1 << 16
POISON = 0xFF
"""A byte of which every float is NaN."""
HALF_LIFE = 16
"""Steps after which a use counts half. Where popularity stays (128 experts, 38 % in slots) 4 steps
find 89.3 % and 16 to 512 find 90.2; of what the shipped model chooses as it reads (38 % of 48) 4
steps find 66.6 %, 16 find 65.8, 64 find 63.1 and 256 find 58.0."""
HITS, MISSES, AHEAD, USED = range(4)
"""Places in `SlotTable.counts`."""


@dataclass(frozen=True, slots=True, eq=False)
class SlotTable:
    """Experts and slots; an expert goes by layer * experts + its number."""

    layers: int
    experts: int
    """Of each layer."""
    slots: int
    rate: int
    """What the clock's tick adds to the time that a use is worth."""
    slot_of: Tensor
    """int32 [layers * experts], -1: in none."""
    owner: Tensor
    """int32 [slots]: who lies there, or is on the way; -1: nobody."""
    used: Tensor
    """int64 [slots]: the clock when it was last claimed."""
    early: Tensor
    """int32 [slots]: 1 if it came by prediction and was not used since."""
    worth: Tensor
    """int64 [layers * experts]."""
    clock: Tensor
    """int64 [1]: layers that have claimed their experts so far."""
    counts: Tensor
    """int64 [4], all by distinct experts of a step of a layer: found in a slot, not found, fetched
    by prediction, and of these those that were used then."""
    fetches: Tensor
    """int32 [1 + 2 * experts]: how many the last claim wants, who they are, and their slots."""

    @classmethod
    def empty(
        cls,
        layers: int,
        experts: int,
        slots: int,
        device: torch.device,
        half_life: float = HALF_LIFE,
    ) -> Self:
        """With nothing in any slot; `half_life` is in steps of all layers.

        Raises KernelInputError unless a step of one layer always fits.
        """
        if not experts <= slots <= MOST_SLOTS:
            raise KernelInputError(
                f"{slots} slots; it takes {experts}, as many as a layer has experts, "
                f"to {MOST_SLOTS}"
            )

        def filled(size: int, value: int, dtype: torch.dtype) -> Tensor:
            return torch.full((size,), value, dtype=dtype, device=device)

        return cls(
            *(layers, experts, slots, max(1, round(UNIT / (half_life * layers)))),
            slot_of=filled(layers * experts, -1, torch.int32),
            owner=filled(slots, -1, torch.int32),
            used=filled(slots, 0, torch.int64),
            early=filled(slots, 0, torch.int32),
            worth=filled(layers * experts, NEVER, torch.int64),
            clock=filled(1, 0, torch.int64),
            counts=filled(4, 0, torch.int64),
            fetches=filled(1 + 2 * experts, 0, torch.int32),
        )


def reused(worth: int, time: int) -> int:
    """The worth after one more use; log2(1 + 2^-gap) is taken as 2^-(whole half-lives of gap)."""
    return max(worth, time) + (UNIT >> min(abs(worth - time) // UNIT, 31))
