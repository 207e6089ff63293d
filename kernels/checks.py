"""What tensors of a product with a packed weight have to be."""

import torch
from torch import Tensor

from .formats import PackedWeight


def misfit(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    experts: Tensor | None,
    gated: bool,
) -> str:
    """What is wrong with the tensors of one product, or nothing.

    `x` is [tokens, K], `out` and `residual` [tokens, R] (R/2 if `gated`) of its dtype, `experts`
    int32 [tokens] for a stack of weights; contiguous, on one device.
    """
    wanted = (len(x), weight.rows // 2 if gated else weight.rows)
    if x.dim() != 2 or x.shape[1] != weight.columns:
        return f"x is {tuple(x.shape)}; it must be [tokens, {weight.columns}]"
    if (experts is None) != (weight.experts is None):
        return "a stack of weights needs `experts`, a single one has none"
    if experts is not None and (experts.dtype != torch.int32 or experts.shape != x.shape[:1]):
        return f"experts is {experts.dtype} {tuple(experts.shape)}; it must be int32 [{len(x)}]"
    if gated and (weight.rows % 2 or residual is not None):
        return "`gated` takes an even number of rows and no residual"
    for name, tensor in (("out", out), ("residual", residual)):
        if tensor is not None and (tuple(tensor.shape) != wanted or tensor.dtype != x.dtype):
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}; not {x.dtype} {wanted}"
    for name, tensor in (("x", x), ("out", out), ("residual", residual), ("experts", experts)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor is not None and tensor.device != weight.device:
            return f"{name} is on {tensor.device}, the weight on {weight.device}"
    return ""
