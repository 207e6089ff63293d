"""How many of each 16 weights survive in which matrix, so that they are so many on average.

Matrices bear pruning unequally. Of each, the error of its outputs is measured for several N; then
survivors go, a step of N at a time, to where they take off most error for each, until the budget is
spent (greedy on the lower convex hull, which is optimal but for the last step; Everett 1963). In
the spirit of OWL (Yin et al. 2023, arXiv:2310.05175), which allots by outliers of activations.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels.formats import SPAN
from ..errors import ConfigError
from .pruning import output_error, strongest

CHOICES = (4, 5, 6, 8)
"""N of N:16."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What pruning does to one matrix."""

    weights: int
    errors: Mapping[int, float]
    """By N: |x (w - w')^T|^2 / |x w^T|^2, times what such an error matters."""

    def times(self, weight: float) -> "Sensitivity":
        """The same of a matrix whose errors matter so much."""
        return Sensitivity(self.weights, {kept: own * weight for kept, own in self.errors.items()})

    def beside(self, other: "Sensitivity") -> "Sensitivity":
        """Of both together, with the same N."""
        errors = {kept: own + other.errors[kept] for kept, own in self.errors.items()}
        return Sensitivity(self.weights + other.weights, errors)


def sensitivity(weight: Tensor, moments: Tensor) -> Sensitivity:
    """Of a matrix [R, K] by the moments [K, K] of its inputs, pruned as by Wanda: cheap, and in the
    same order as better ways would find."""
    strength = weight.float().abs() * moments.diagonal().float().sqrt()
    errors = {
        kept: output_error(weight, weight.float() * strongest(strength, kept), moments)
        for kept in CHOICES
    }
    return Sensitivity(weight.numel(), errors)


def allot(
    found: Mapping[str, Sensitivity],
    sparsity: float,
    kind: Callable[[str], str] = str,
) -> dict[str, int]:
    """N for each matrix, such that at least the share `sparsity` of all weights goes.

    Matrices of one `kind` have the same N. Raises ConfigError if no choice of N is as sparse, or
    none as dense.
    """
    kinds: dict[str, Sensitivity] = {}
    for name, own in found.items():
        same = kinds.get(kind(name))
        kinds[kind(name)] = own if same is None else same.beside(own)
    chosen = _chosen(kinds, sparsity)
    return {name: chosen[kind(name)] for name in found}


def _chosen(found: Mapping[str, Sensitivity], sparsity: float) -> dict[str, int]:
    if not 1 - CHOICES[-1] / SPAN <= sparsity <= 1 - CHOICES[0] / SPAN:
        raise ConfigError(
            f"a sparsity of {sparsity} is out of reach: {CHOICES[0]}:16 to {CHOICES[-1]}:16 are "
            f"{1 - CHOICES[-1] / SPAN} to {1 - CHOICES[0] / SPAN}"
        )
    chosen = dict.fromkeys(found, CHOICES[0])
    total = sum(each.weights for each in found.values())
    left = round((1 - sparsity) * SPAN * total) - CHOICES[0] * total
    heap = [step for name in found for step in _best_step(name, found[name], CHOICES[0], left)]
    heapq.heapify(heap)
    while heap:
        _, name, kept = heapq.heappop(heap)
        cost = (kept - chosen[name]) * found[name].weights
        if cost <= left:
            chosen[name] = kept
            left -= cost
        for step in _best_step(name, found[name], chosen[name], left):
            heapq.heappush(heap, step)
    return chosen


def _best_step(name: str, found: Sensitivity, kept: int, left: int) -> list[tuple[float, str, int]]:
    """(minus the error that each further survivor takes off, name, N) of the best larger N that
    what is left can pay for; nothing if there is none."""
    steps = [
        (-(found.errors[kept] - found.errors[more]) / ((more - kept) * found.weights), name, more)
        for more in CHOICES
        if more > kept and (more - kept) * found.weights <= left
    ]
    return [min(steps)] if steps else []
