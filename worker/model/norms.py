"""RMS norms, and branches that are normed before they join the residual.

A card's kernels do what stands between two products at once (`kernels.norm`); a CPU and training
take torch's calls, one after the other, with the same roundings.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.norm import DTYPES, MOST, normed_sum, norms


def rms_norm(values: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """`values` / rms over the last dimension, times `weight` (no +1), computed in float32.

    A GPU has a kernel for it: torch's takes 8 us for one row of 5,376 (an H100). On a CPU
    F.rms_norm is six calls, 25 us for one token; with hypot(norm, sqrt(n * epsilon)) for the root
    it is four calls and 12 us, 30 times a step.
    """
    size = int(values.shape[-1])  # a plain number also where the step is being recorded
    if weight is not None and by_kernel(values, weight):
        return norms(values, [weight], epsilon)[0]
    if values.is_cuda:
        return F.rms_norm(values, (size,), weight, epsilon)
    exact = values.float()
    zero, floor = _norm_constants(size, epsilon)
    length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).hypot(floor)
    scaled = torch.addcdiv(zero, exact, length, value=math.sqrt(size))
    return (scaled if weight is None else scaled * weight).to(values.dtype)


def by_kernel(values: Tensor, *weights: Tensor) -> bool:
    """Whether a kernel of ours norms `values` by each of `weights`. It cannot be differentiated."""
    return (
        values.is_cuda
        and values.dtype in DTYPES
        and values.shape[-1] <= MOST
        and values.is_contiguous()
        and all(weight.dtype == values.dtype for weight in weights)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(own.requires_grad for own in (values, *weights)))
    )


@lru_cache
def _norm_constants(size: int, epsilon: float) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # or training after a first inference could not use them
        return torch.zeros((), device="cpu"), torch.tensor(math.sqrt(size * epsilon), device="cpu")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, [..., size] to the same."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, values: Tensor) -> Tensor:
        return rms_norm(values, self.weight, self.epsilon)


def joined(
    residual: Tensor,
    branch: Tensor,
    own: RMSNorm,
    scale: Tensor | None = None,
    following: Sequence[RMSNorm] = (),
) -> list[Tensor]:
    """(residual + own(branch)) * scale, and what norms make of that; all [T, size]."""
    weights = [each.weight for each in following]
    if by_kernel(branch, own.weight, *weights) and residual.is_contiguous():
        return normed_sum([(branch, own.weight)], residual, scale, weights, epsilon=own.epsilon)
    total = residual + own(branch)
    total = total if scale is None else total * scale
    return [total, *(each(total) for each in following)]
