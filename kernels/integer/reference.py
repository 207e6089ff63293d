"""What the kernels of this folder compute, in torch, on any device."""

import torch
from torch import Tensor

from .digits import _MARGIN, _STEP, LIMIT


def whole_numbers(x: Tensor, max_error: float) -> tuple[Tensor, Tensor]:
    """Rows of `x` [T, K] as int32 [T, K] and what one is worth, float32 [T]; see `digits`."""
    allowed = max_error * _MARGIN
    own = x.float()
    most = own.abs().amax(1, keepdim=True)
    # Of the smallest numbers, whose reciprocals would be infinite, 2^64 times as much.
    larger = torch.where(most < 2.0**-100, 2.0**64, 1.0)
    most = most * larger
    own = own * larger * torch.where(most > 0, LIMIT / most, 0.0)
    power = own.square().sum(1, keepdim=True)
    fails = _error(own) > allowed**2 * power
    wider = 1 / (_STEP.value * allowed * (power / x.shape[1]).sqrt())
    coarse = _error(own * wider) > allowed**2 * power * wider**2
    wider = torch.where(fails, torch.where(coarse, 2 * wider, wider), 1.0)
    steps = most / wider / LIMIT / larger
    steps = torch.where(power.isfinite(), steps, torch.nan)
    return (own * wider).round().nan_to_num().int(), steps[:, 0]


def _error(values: Tensor) -> Tensor:
    return (values - values.round()).square().sum(1, keepdim=True)


def rounded(x: Tensor, max_error: float) -> Tensor:
    """Rows of `x` [..., K] as products of integers see them, float32."""
    whole, steps = whole_numbers(x.reshape(-1, x.shape[-1]), max_error)
    return (whole * steps[:, None]).view(x.shape)
