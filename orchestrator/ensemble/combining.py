"""The arithmetic of fusing: members' next-token distributions to one, and one token from it.

A member tells its likeliest tokens; the probability that they leave is spread evenly over the rest
of its vocabulary, but no unnamed token gets more than the least named one. Over the union of all
named tokens the members' distributions are then mixed, weighted: the mean of probabilities, or the
renormalised mean of log-probabilities (product of experts, Hinton 2002). UniTE (arXiv 2410.03777)
shows that the union is enough: it holds under 0.04 % of the vocabulary. Plain float64: for some
hundred tokens a dict is faster than an array library, and this runs once a token.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from ...worker.draws import uniform

SMALLEST = 1e-30
"""Keeps log 0 out of a product; a token that one member rules out stays ruled out in effect."""
_LEAST = math.log(SMALLEST)


class Told:
    """What one member told of its next token.

    Args:
        ids: its likeliest tokens, the likeliest first.
        logprobs: theirs, natural logarithms.
        vocabulary: tokens in all.
        weight: the member's share.
    """

    def __init__(
        self, ids: Sequence[int], logprobs: Sequence[float], vocabulary: int, weight: float = 1.0
    ) -> None:
        self.weight = weight
        self.ids = ids[:]
        self.values = logprobs[:]  # of a message, a slice is the quickest copy
        self.logprobs: dict[int, float] = dict(zip(self.ids, self.values, strict=True))
        unnamed = vocabulary - len(self.ids)
        rest = max(0.0, 1.0 - sum(map(math.exp, self.values))) / unnamed if unnamed else 0.0
        self.floor = min(math.log(max(rest, SMALLEST)), self.values[-1])
        """Log-probability of a token that it has not named."""

    @property
    def favourite(self) -> int:
        """Its likeliest token."""
        return self.ids[0]

    def logprob(self, token: int) -> float:
        """Of any token."""
        return self.logprobs.get(token, self.floor)


class Fused(ABC):
    """A combined distribution over the union of the named tokens; mixed only as far as is asked."""

    def __init__(self, told: Sequence[Told]) -> None:
        self.told = told
        self.share = sum(each.weight for each in told)

    @cached_property
    @abstractmethod
    def mixed(self) -> dict[int, float]:
        """What each token has; not normalised."""

    @abstractmethod
    def value(self, token: int) -> float:
        """What one named token has in `mixed`, to the last bit."""

    @abstractmethod
    def bound(self, rank: int) -> float:
        """The most that a token can have which no member names before that place of its list."""

    def likeliest(self, banned: frozenset[int]) -> int | None:
        """The likeliest token, of equals the one with the smallest id; None if all are banned.

        The lists descend, so reading them side by side one soon knows that nothing better follows
        (the threshold algorithm, Fagin, Lotem and Naor 2003): at once, if the members agree.
        """
        best, most = None, -math.inf
        for rank in range(max(len(each.ids) for each in self.told)):
            for token in {each.ids[rank] for each in self.told if rank < len(each.ids)} - banned:
                value = self.value(token)
                if best is None or value > most or (value == most and token < best):
                    best, most = token, value
            if most > self.bound(rank + 1):
                break
        return best

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """The likeliest first."""
        return tuple(sorted(self.mixed, key=lambda token: (-self.mixed[token], token)))

    @cached_property
    def probabilities(self) -> tuple[float, ...]:
        """Of `ids`; they sum to 1."""
        total = sum(self.mixed.values())
        return tuple([self.mixed[token] / total for token in self.ids])

    @cached_property
    def logprobs(self) -> tuple[float, ...]:
        """Natural logarithms of the probabilities."""
        return tuple([math.log(max(p, SMALLEST)) for p in self.probabilities])


class Mean(Fused):
    """Of probabilities: every member gives every token its floor; a named one gets what it has
    above that."""

    def __init__(self, told: Sequence[Told]) -> None:
        super().__init__(told)
        floors = [math.exp(each.floor) for each in told]
        pairs = tuple(zip(told, floors, strict=True))
        self._base = sum(each.weight * floor for each, floor in pairs) / self.share
        self._parts = [(each, each.weight / self.share, floor) for each, floor in pairs]

    @cached_property
    def mixed(self) -> dict[int, float]:
        mixed: dict[int, float] = {}
        for each, weight, floor in self._parts:
            for token, logprob in each.logprobs.items():
                above = weight * (math.exp(logprob) - floor)
                mixed[token] = mixed.get(token, self._base) + above
        return mixed

    def value(self, token: int) -> float:
        value = self._base
        for each, weight, floor in self._parts:
            if token in each.logprobs:
                value += weight * (math.exp(each.logprobs[token]) - floor)
        return value

    def bound(self, rank: int) -> float:
        value = self._base
        for each, weight, floor in self._parts:
            if rank < len(each.values):
                value += weight * (math.exp(each.values[rank]) - floor)
        return value


class Product(Fused):
    """The renormalised mean of log-probabilities."""

    @cached_property
    def mixed(self) -> dict[int, float]:
        named = {token for each in self.told for token in each.logprobs}
        return {token: self.value(token) for token in named}

    def value(self, token: int) -> float:
        return self._of(each.logprob(token) for each in self.told)

    def bound(self, rank: int) -> float:
        return self._of(
            each.values[rank] if rank < len(each.values) else each.floor for each in self.told
        )

    def _of(self, logprobs: Iterable[float]) -> float:
        """What a token has to which the members give these."""
        pairs = zip(self.told, logprobs, strict=True)
        weighted = sum(each.weight * max(logprob, _LEAST) for each, logprob in pairs)
        return math.exp(weighted / self.share)


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

    @property
    def free(self) -> bool:
        """Whether the scores stay as the models gave them."""
        return not (self.logit_bias or self.presence_penalty or self.frequency_penalty)


def combine(told: Sequence[Told], product: bool = False) -> Fused:
    """One distribution from the members'.

    Args:
        told: one a member, at least one.
        product: the mean of log-probabilities instead of the mean of probabilities.
    """
    return Product(told) if product else Mean(told)


def choose(
    fused: Fused, rules: Rules, index: int, counts: Mapping[int, int], banned: Iterable[int]
) -> int:
    """One token.

    The order is the worker's sampler's: bias and penalties, temperature, top-k, top-p, min-p, and
    one draw by (seed, index).

    Args:
        fused: the combined distribution.
        rules: how to choose.
        index: the token's place in the answer.
        counts: how often each token stands in the answer already.
        banned: tokens that must not be chosen.
    """
    banned = frozenset(banned)
    if rules.temperature == 0 and rules.free:
        likeliest = fused.likeliest(banned)
        if likeliest is not None:
            return likeliest
    scores = _adjusted(fused, rules, counts, banned)
    if rules.temperature == 0:
        return fused.ids[max(range(len(scores)), key=scores.__getitem__)]
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    weights = _cut([scores[place] for place in order], rules)
    cumulative = list(accumulate(weights))
    threshold = uniform(rules.seed, index) * cumulative[-1]
    drawn = (order[rank] for rank, bound in enumerate(cumulative) if bound > threshold)
    return fused.ids[next(drawn, order[0])]


def _adjusted(
    fused: Fused, rules: Rules, counts: Mapping[int, int], banned: frozenset[int]
) -> list[float]:
    """Scores after bias, penalties and bans."""
    scores = list(fused.logprobs)
    if rules.free and not banned:
        return scores
    for place, token in enumerate(fused.ids):
        scores[place] += rules.logit_bias.get(token, 0.0)
        if token in counts:
            scores[place] -= rules.presence_penalty + rules.frequency_penalty * counts[token]
        if token in banned:
            scores[place] = -math.inf
    return scores


def _cut(scores: Sequence[float], rules: Rules) -> list[float]:
    """Weights to draw from: softmax of descending scores after temperature, cut by the rules."""
    best, temperature = scores[0], max(rules.temperature, 1e-6)
    kept = scores[: rules.top_k] if rules.top_k else scores
    weights = [math.exp((score - best) / temperature) for score in kept]
    total, before = sum(weights), 0.0
    for place, weight in enumerate(weights):
        reached = rules.top_p < 1 and before >= rules.top_p * total
        if place and (reached or weight < rules.min_p * weights[0]):
            return weights[:place]
        before += weight
    return weights
