"""The arithmetic of fusing: members' next-token distributions to one, and one token from it.

A member tells its likeliest tokens; the probability that they leave is spread evenly over the rest
of its vocabulary, but no unnamed token gets more than the least named one. Over the union of all
named tokens the members' distributions are then mixed, weighted: the mean of probabilities, or the
renormalised mean of log-probabilities (product of experts, Hinton 2002). UniTE (arXiv 2410.03777)
shows that the union is enough: it holds under 0.04 % of the vocabulary. All in float64.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

from ...worker.draws import uniform

Floats = NDArray[numpy.float64]
Ids = NDArray[numpy.int64]
SMALLEST = 1e-30
"""Keeps log 0 out of a product; a token that one member rules out stays ruled out in effect."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one member told of its next token."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    """In descending order."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Fused:
    """A combined distribution over the union of the named tokens, likeliest first."""

    ids: Ids
    probabilities: Floats
    """Sum to 1 over the union."""
    members: Floats
    """[members, union]: each one's own log-probability."""
    favourites: tuple[int, ...]
    """Each member's likeliest token."""

    def logprobs(self) -> Floats:
        """Natural logarithms of the probabilities."""
        return numpy.log(numpy.maximum(self.probabilities, SMALLEST))


@dataclass(frozen=True, slots=True)
class Rules:
    """How one token is chosen; the fields mean what they mean in SamplingParams."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0


def combine(told: Sequence[Told], vocabulary: int, product: bool = False) -> Fused:
    """One distribution from the members'.

    Args:
        told: one a member, at least one.
        vocabulary: tokens that the members share.
        product: the mean of log-probabilities instead of the mean of probabilities.
    """
    union = numpy.unique(numpy.concatenate([numpy.asarray(t.ids, numpy.int64) for t in told]))
    members = numpy.stack([_spread(t, union, vocabulary) for t in told])
    weights = numpy.array([t.weight for t in told])
    weights /= weights.sum()
    if product:
        mixed = numpy.exp(weights @ numpy.maximum(members, math.log(SMALLEST)))
    else:
        mixed = weights @ numpy.exp(members)
    order = numpy.argsort(-mixed, kind="stable")
    probabilities = mixed[order] / mixed.sum()
    favourites = tuple(int(t.ids[0]) for t in told)
    return Fused(union[order], probabilities, members[:, order], favourites)


def choose(
    fused: Fused, rules: Rules, index: int, counts: Mapping[int, int], banned: Sequence[int]
) -> int:
    """The position in `fused.ids` of the chosen token.

    The order is the worker's sampler's: bias and penalties, temperature, top-k, top-p, min-p, and
    one draw by (seed, index).

    Args:
        fused: the combined distribution.
        rules: how to choose.
        index: the token's place in the answer.
        counts: how often each token stands in the answer already.
        banned: tokens that must not be chosen.
    """
    scores = fused.logprobs()
    for token, bias in rules.logit_bias.items():
        scores[fused.ids == token] += bias
    if rules.presence_penalty or rules.frequency_penalty:
        for token, count in counts.items():
            scores[fused.ids == token] -= rules.presence_penalty + rules.frequency_penalty * count
    for token in banned:
        scores[fused.ids == token] = -math.inf
    if rules.temperature == 0:
        return int(scores.argmax())
    return _draw(scores, rules, uniform(rules.seed, index))


def _spread(told: Told, union: Ids, vocabulary: int) -> Floats:
    """Log-probabilities of one member over the union."""
    ids = numpy.asarray(told.ids, numpy.int64)
    logprobs = numpy.asarray(told.logprobs, numpy.float64)
    unnamed = vocabulary - len(ids)
    rest = max(0.0, 1.0 - float(numpy.exp(logprobs).sum())) / unnamed if unnamed else 0.0
    floor = min(math.log(max(rest, SMALLEST)), float(logprobs[-1]))
    spread = numpy.full(len(union), floor)
    spread[numpy.searchsorted(union, ids)] = logprobs
    return spread


def _draw(scores: Floats, rules: Rules, number: float) -> int:
    order = numpy.argsort(-scores, kind="stable")
    scaled = (scores[order] - scores[order[0]]) / max(rules.temperature, 1e-6)
    if rules.top_k:
        scaled[rules.top_k :] = -math.inf
    weights = numpy.exp(scaled)
    weights /= weights.sum()
    before = numpy.cumsum(weights) - weights
    kept = ((before < rules.top_p) | (rules.top_p >= 1)) & (weights >= rules.min_p * weights[0])
    cumulative = numpy.cumsum(numpy.where(kept, weights, 0.0))
    picked = int(numpy.searchsorted(cumulative, number * cumulative[-1], side="right"))
    last = int(numpy.flatnonzero(kept & (weights > 0))[-1])  # rounding may point past it
    return int(order[min(picked, last)])
