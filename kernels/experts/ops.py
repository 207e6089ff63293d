"""What is around the products of experts, and whether a kernel does it.

| op         | kernel (bfloat16 and float16 on a card)      | else         |
| ---------- | -------------------------------------------- | ------------ |
| `choose`   | up to `MOST_EXPERTS`, `MOST_ACTIVE` a token  | `reference`  |
| `dispatch` | up to `MOST_PAIRS`: decode steps             | `reference`  |
| `combine`  | up to `MOST_ACTIVE` a token                  | `reference`  |

What is differentiated, or compiled by torch, is left to torch. See `reference` for what they do.
"""

import torch
from torch import Tensor

from . import reference, routing
from .routing import DTYPES, MOST_ACTIVE, MOST_EXPERTS, MOST_PAIRS, UNIT


def choose(scores: Tensor, scale: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """See `reference.choose`; of equal scores a kernel takes those of the first experts."""
    few = scores.shape[1] <= MOST_EXPERTS and active <= MOST_ACTIVE
    if few and scores.dtype == scale.dtype and _runs(scores, scale):
        return routing.choose(scores.contiguous(), scale, active)
    return reference.choose(scores, scale, active)


def dispatch(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.dispatch`."""
    if chosen.numel() <= MOST_PAIRS and hidden.shape[1] % UNIT == 0 and _runs(hidden):
        return routing.dispatch(hidden.contiguous(), chosen.contiguous())
    return reference.dispatch(hidden, chosen)


def combine(outputs: Tensor, weights: Tensor, back: Tensor) -> Tensor:
    """See `reference.combine`."""
    few = back.shape[1] <= MOST_ACTIVE
    if few and outputs.shape[1] % UNIT == 0 and _runs(outputs, weights):
        return routing.combine(outputs.contiguous(), weights.contiguous(), back.contiguous())
    return reference.combine(outputs, weights, back)


def _runs(values: Tensor, *others: Tensor) -> bool:
    """Whether a kernel takes `values`, and nobody asks for gradients."""
    if not values.is_cuda or values.dtype not in DTYPES or torch.compiler.is_compiling():
        return False
    differentiated = any(each.requires_grad for each in (values, *others))
    return not (differentiated and torch.is_grad_enabled())
