"""What is around the products of experts in plain torch: the truth, and what runs on a CPU."""

import torch
from torch import Tensor


def choose(scores: Tensor, scale: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Each token's `active` likeliest experts and their weights, from a router's scores.

    w = p / (sum of the chosen p) * scale[chosen], where p = softmax(scores) over all experts.

    Args:
        scores: [T, E].
        scale: [E], of each expert.
        active: 1 to E.

    Returns weights, float32, and experts, int64, both [T, active], the likeliest first. Where a
    score is NaN the token's weights are.
    """
    probabilities = scores.softmax(-1, dtype=torch.float32)
    weights, chosen = probabilities.topk(active, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale[chosen], chosen


def dispatch(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each pair of a token and one of its experts, sorted by expert.

    Args:
        hidden: [T, H].
        chosen: int64 [T, active], the experts of each token.

    Returns the rows [T * active, H], their experts, int32 [T * active] in ascending order, and the
    row of each pair, int64 [T, active]. Pairs of an expert keep their order.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    active = chosen.shape[1]
    return hidden[order // active], flat[order].int(), back.unflatten(0, (-1, active))


def combine(outputs: Tensor, weights: Tensor, back: Tensor) -> Tensor:
    """out[t] = sum over k of weights[t, k] * outputs[back[t, k]], in float32, rounded once.

    Args:
        outputs: [T * active, H].
        weights: float32 [T, active].
        back: int64 [T, active].

    Returns [T, H] in the dtype of `outputs`.
    """
    combined: Tensor = (outputs[back] * weights[..., None]).sum(1).to(outputs.dtype)
    return combined
