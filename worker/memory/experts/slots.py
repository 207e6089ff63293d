"""How many slots for single experts a budget has: a pure function of bytes.

Experts that do not fit all lie on the host, and as many as there is room for also in slots that all
layers share: a layer that stayed whole would starve the others (research: imp#2069). A step of one
layer must always fit, so there are as many slots as a layer has experts, or none. What it gave up:
layers whose experts are not alike (N:16 with another N in each layer); these are streamed whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch

from ....kernels.residence.table import MOST_SLOTS
from ...model.storage import LayerStorage, aligned

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one tensor of an expert."""
_STEP = 16
"""Bytes that a device copies at a time."""
HIT_RATES = ((0.0, 0.0), (0.06, 0.366), (0.19, 0.741), (0.38, 0.894), (0.63, 0.962), (1.0, 1.0))
"""Share of experts in slots, and of those chosen that LRU finds there: published for 128 experts of
which a token takes eight (Qwen3-30B, imp#1374). Assumed where nothing was measured."""


@dataclass(frozen=True, slots=True)
class ExpertSlots:
    """Experts on the host, and their slots on the device."""

    layers: tuple[int, ...]
    """Of the model, that have experts."""
    experts: int
    """Of each of them."""
    slots: int
    parts: tuple[Part, ...]
    """The tensors of one expert, in the order in which they lie."""

    @property
    def offsets(self) -> list[int]:
        """Bytes from an expert's beginning to each part's."""
        return [0, *accumulate(map(_size, self.parts[:-1]))]

    @property
    def expert_bytes(self) -> int:
        """Of one expert or slot, each tensor aligned."""
        return sum(map(_size, self.parts))

    @property
    def bytes(self) -> int:
        """On the device."""
        return self.slots * self.expert_bytes

    @property
    def host_bytes(self) -> int:
        return len(self.layers) * self.experts * self.expert_bytes

    @property
    def share(self) -> float:
        """Of all experts that can be in slots."""
        return self.slots / (len(self.layers) * self.experts)

    def missing(self, active: int, tokens: int) -> float:
        """Experts that a step of so many tokens is expected to lack, of all layers together.

        One token finds what `hit_rate` says; the more experts a step needs, the nearer it comes to
        the share of them that is in slots.
        """
        needed = self.experts * (1 - (1 - active / self.experts) ** tokens)
        crowd = (needed - active) / max(1, self.experts - active)
        found = self.hit_rate * (1 - crowd) + self.share * crowd
        return len(self.layers) * needed * (1 - found)

    @property
    def hit_rate(self) -> float:
        """To be expected of one sequence that decodes, by `HIT_RATES`."""
        for (low, before), (high, after) in pairwise(HIT_RATES):
            if self.share <= high:
                return before + (after - before) * (self.share - low) / (high - low)
        return 1.0


def choose_slots(layers: Sequence[LayerStorage], room: int) -> ExpertSlots | None:
    """As many slots as `room` has bytes for beside all that is not an expert.

    None if there are no experts, or not alike, or a layer's do not fit.
    """
    least = fewest_slots(layers)
    if least is None:
        return None
    beside = sum(layer.block - layer.expert_block for layer in layers)
    every = len(least.layers) * least.experts
    count = min((room - beside) // least.expert_bytes, every, MOST_SLOTS)
    if count < least.experts:
        return None
    return ExpertSlots(least.layers, least.experts, count, least.parts)


def fewest_slots(layers: Sequence[LayerStorage]) -> ExpertSlots | None:
    """Those that one layer needs; None if experts of these layers cannot be streamed."""
    own = {number: layer for number, layer in enumerate(layers) if layer.experts}
    kinds = {(layer.experts, layer.expert_parts) for layer in own.values()}
    if len(kinds) != 1:
        return None
    ((experts, parts),) = kinds
    if any(prod(shape) * dtype.itemsize % _STEP for shape, dtype in parts):
        return None
    return ExpertSlots(tuple(own), experts, experts, parts)


def _size(part: Part) -> int:
    shape, dtype = part
    return aligned(prod(shape) * dtype.itemsize)
