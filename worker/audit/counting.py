"""How far off what is read back is from what was stored, counted vector by vector.

Errors are taken in float64 from the two vectors alone; nothing that the store says of itself
enters. Kept are the worst, the first that are too large and where they are, and fine bins, from
which percentiles come. What it gave up: percentiles finer than a bin, 1/1000 of the error allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 20
"""Of a histogram, between no error and the error allowed."""
FINE = 1000
"""Bins that are counted."""
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
KEPT = 10
"""Excesses that are told one by one."""


def relative_errors(exact: Tensor, read: Tensor) -> Tensor:
    """||exact - read|| / ||exact|| over the last dimension of [..., head_dim], float64.

    Of a vector of zeros 0 if zeros are read, else infinity; NaN where either has one.
    """
    own = exact.double()
    lost, size = (own - read.double()).norm(dim=-1), own.norm(dim=-1)
    return torch.where((size == 0) & (lost == 0), 0.0, lost / size)


@dataclass(frozen=True, slots=True)
class Place:
    """One vector and its error."""

    error: float
    layer: int
    side: str
    document: int
    """Its number, from 0."""
    token: int
    head: int


@dataclass(frozen=True, slots=True)
class Errors:
    """Of all keys or all values of a layer, or of several layers."""

    vectors: int
    above: int
    """How many are off by more than is allowed, or not by a number."""
    within: float
    """The share of the others; 1 only if those are all."""
    worst: Place | None
    percentiles: dict[str, float]
    """So many of a hundred vectors are off by no more than this: the upper edge of a fine bin."""
    histogram: tuple[int, ...]
    """Vectors in each of `BINS` equal steps up to the error allowed, then those above it."""
    excesses: tuple[Place, ...]
    """The first `KEPT` of those above."""


class ErrorCount:
    """Counts the errors of a layer's keys, or of its values, against the largest one allowed."""

    def __init__(self, max_error: float, layer: int, side: str) -> None:
        self.max_error = max_error
        self.layer = layer
        self.side = side
        self.bins = torch.zeros(FINE + 1, dtype=torch.int64)
        self.worst: Place | None = None
        self.excesses: list[Place] = []

    def add(self, errors: Tensor, document: int) -> None:
        """Errors [T, heads] of one document's tokens; NaN counts as infinitely far off."""
        errors = errors.double().nan_to_num(nan=math.inf, posinf=math.inf)
        above = errors > self.max_error
        steps = (errors / self.max_error * FINE).ceil() - 1
        bins = torch.where(above, FINE, steps.clamp(0, FINE - 1)).long().flatten()
        self.bins += bins.bincount(minlength=FINE + 1).cpu()
        if errors.numel():
            worst = self._place(errors, int(errors.argmax()), document)
            if self.worst is None or worst.error > self.worst.error:
                self.worst = worst
        room = KEPT - len(self.excesses)
        for index in above.flatten().nonzero().flatten()[:room].tolist():
            self.excesses.append(self._place(errors, index, document))

    def _place(self, errors: Tensor, index: int, document: int) -> Place:
        token, head = divmod(index, errors.shape[1])
        error = float(errors[token, head])
        return Place(error, self.layer, self.side, document, token, head)


def errors_of(counts: Sequence[ErrorCount]) -> Errors:
    """All that was counted, of counts with the same error allowed."""
    bins = torch.stack([each.bins for each in counts]).sum(0)
    vectors, above = int(bins.sum()), int(bins[-1])
    worst = max((e.worst for e in counts if e.worst), key=lambda place: place.error, default=None)
    return Errors(
        vectors=vectors,
        above=above,
        within=(vectors - above) / max(1, vectors),
        worst=worst,
        percentiles=_percentiles(bins, counts[0].max_error, worst.error if worst else 0.0),
        histogram=(*bins[:-1].view(BINS, -1).sum(1).tolist(), above),
        excesses=tuple(place for each in counts for place in each.excesses)[:KEPT],
    )


def _percentiles(bins: Tensor, max_error: float, worst: float) -> dict[str, float]:
    reached, found = bins.cumsum(0), {}
    for percent in PERCENTILES:
        index = int((reached < percent / 100 * reached[-1]).sum())
        edge = max_error * (index + 1) / FINE if index < FINE else worst
        found[f"{percent:g}"] = min(edge, worst)
    return found
