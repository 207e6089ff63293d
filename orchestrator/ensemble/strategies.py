"""From a checked spec to the generator that carries its strategy out."""

from collections.abc import Callable

from ...protos.ensemble_pb2 import BestOf, EnsembleSpec
from ...protos.ensemble_pb2 import Fuse as FuseSpec
from ...protos.generation_pb2 import GenerateRequest
from .best_of import best_of
from .calls import Strategy, View
from .cascade import cascade
from .fuse import fuse
from .hedge import hedge, single
from .mixture import TEMPLATE, mixture
from .mixture_sample import mixture_sample
from .spec import STEP_SECONDS, Spec
from .vote import vote

USUAL_QUANTILE = 0.95
USUAL_CANDIDATES = 64
USUAL_LOGPROB = -1.0

FirstTokenQuantile = Callable[[float], float]
"""Seconds within which that fraction of first tokens came."""


def start(
    spec: Spec, request: GenerateRequest, seed: int, first_token: FirstTokenQuantile
) -> Strategy:
    """The strategy, not yet begun.

    Args:
        spec: the ensemble.
        request: what it shall answer.
        seed: of its own draws.
        first_token: what was observed.
    """
    weights = tuple(member.weight for member in spec.members)
    view = View(weights, spec.quorum, spec.hasty, seed)
    message = spec.message
    match spec.strategy:
        case "single":
            return single(view)
        case "hedge":
            return hedge(view, _hedge_after(message, first_token))
        case "vote":
            ask = message.vote
            extract = ask.extract if ask.HasField("extract") else None
            normalize = ask.normalize if ask.HasField("normalize") else True
            return vote(view, ask.samples or view.width, extract, normalize)
        case "best_of":
            cross = message.best_of.ranking != BestOf.RANKING_OWN
            return best_of(view, message.best_of.samples or view.width, cross)
        case "cascade":
            least = message.cascade
            return cascade(
                view,
                least.min_mean_logprob if least.HasField("min_mean_logprob") else USUAL_LOGPROB,
            )
        case "mixture":
            return _mixture(view, message, request)
        case "fuse":
            return _fuse(view, message.fuse, spec.timeout)
        case "mixture_sample":
            return mixture_sample(view, spec.timeout or STEP_SECONDS)
    raise AssertionError(f"a checked spec has a known strategy, not {spec.strategy}")


def _hedge_after(message: EnsembleSpec, first_token: FirstTokenQuantile) -> float:
    hedging = message.hedge
    if hedging.HasField("after_seconds"):
        return hedging.after_seconds
    return first_token(hedging.quantile if hedging.HasField("quantile") else USUAL_QUANTILE)


def _mixture(view: View, message: EnsembleSpec, request: GenerateRequest) -> Strategy:
    asked = message.mixture
    aggregator = asked.aggregator if asked.HasField("aggregator") else view.width - 1
    template = asked.template if asked.HasField("template") else TEMPLATE
    return mixture(view, request.prompt, aggregator, template)


def _fuse(view: View, asked: FuseSpec, timeout: float | None) -> Strategy:
    candidates = asked.candidates if asked.HasField("candidates") else USUAL_CANDIDATES
    product = asked.combine == FuseSpec.COMBINE_PRODUCT
    return fuse(view, candidates, product, timeout or STEP_SECONDS)
