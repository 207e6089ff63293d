"""A trace of choices played through a policy: how many experts it finds in slots, and at best.

At best is Belady's rule, which knows the future: whoever is needed again last goes first. Both
hold the experts of a running layer, and fetch on demand alone. A pure function of the trace.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels.residence import reference
from ....kernels.residence.table import AHEAD, HALF_LIFE, HITS, MISSES, USED, SlotTable

_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of a trace, by distinct experts of each layer's step."""

    hits: int
    misses: int
    foreseen: int = 0
    """Fetched ahead."""
    foreseen_used: int = 0

    @property
    def rate(self) -> float:
        """Of what was asked for, the part that was found."""
        return self.hits / max(1, self.hits + self.misses)


def by_policy(
    trace: Tensor,
    experts: int,
    slots: int,
    warm: int = 0,
    half_life: float = HALF_LIFE,
    foreseen: Tensor | None = None,
) -> Replay:
    """Replay int64 [steps, layers, choices] by the rule that engines use, `SlotTable`'s.

    The first `warm` steps fill the slots and do not count. With `foreseen`, guesses of the same
    shape, a layer's are fetched while the layer before it runs.
    """
    table = SlotTable.empty(trace.shape[1], experts, slots, torch.device("cpu"), half_life)
    for number, step in enumerate(trace):
        if number == warm:
            table.counts.zero_()
        for layer, chosen in enumerate(step):
            reference.claim(table, layer, chosen)
            if foreseen is not None and layer + 1 < len(step):
                reference.claim(table, layer + 1, foreseen[number, layer + 1], ahead=True)
    counts = table.counts.tolist()
    return Replay(counts[HITS], counts[MISSES], counts[AHEAD], counts[USED])


def by_age(trace: Tensor, experts: int, slots: int, warm: int = 0) -> Replay:
    """The same where whoever was used longest ago goes first (LRU)."""
    held: OrderedDict[int, None] = OrderedDict()
    counted = _Counter(warm * trace.shape[1])
    for needed in _needed(trace, experts):
        counted.add(needed, needed & held.keys())
        for each in sorted(needed):
            held[each] = None
            held.move_to_end(each)
        while len(held) > slots:
            held.popitem(last=False)
    return counted.replay()


def at_best(trace: Tensor, experts: int, slots: int, warm: int = 0) -> Replay:
    """The same where whoever is needed again last goes first (Belady)."""
    steps = list(_needed(trace, experts))
    again: list[dict[int, int]] = []
    seen: dict[int, int] = {}
    for time, needed in reversed(list(enumerate(steps))):
        again.append({each: seen.get(each, _NEVER) for each in needed})
        seen.update(dict.fromkeys(needed, time))
    held: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    counted = _Counter(warm * trace.shape[1])
    for needed, times in zip(steps, reversed(again), strict=True):
        found = needed & held.keys()
        counted.add(needed, found)
        room = slots - len(needed - found)
        while len(held) > room:
            time, each = heapq.heappop(latest)
            if held.get(each) == -time and each not in needed:
                del held[each]
        held.update(times)
        for each, time in times.items():
            heapq.heappush(latest, (-time, each))
    return counted.replay()


class _Counter:
    """Hits and misses after so many steps of a layer."""

    def __init__(self, skipped: int) -> None:
        self._skipped = skipped
        self._hits = self._misses = 0

    def add(self, needed: set[int], found: set[int]) -> None:
        self._skipped -= 1
        if self._skipped < 0:
            self._hits += len(found)
            self._misses += len(needed) - len(found)

    def replay(self) -> Replay:
        return Replay(self._hits, self._misses)


def _needed(trace: Tensor, experts: int) -> Iterator[set[int]]:
    """Of each layer's step in their order, experts by layer * experts + number."""
    layers = trace.shape[1]
    for number, chosen in enumerate(trace.flatten(0, 1).tolist()):
        first = number % layers * experts
        yield {first + each for each in chosen}
