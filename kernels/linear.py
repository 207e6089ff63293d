"""A linear layer of a packed weight: the op that models call, and which kernel does it.

| tokens       | N:16 int4, groups of 64 or 128             | other formats          |
| ------------ | ------------------------------------------ | ---------------------- |
| 1 to 4       | `sparse_gemv` (NVIDIA), else `sparse_gather` | expand, then a matmul |
| 5 to `MANY`  | `sparse_matmul` (NVIDIA, bfloat16)         | expand, then a matmul  |
| more         | expand, then a matmul                      | expand, then a matmul  |

Expanding writes the dense weight into scratch memory that all layers share, and leaves the product
to the vendor's library. On a CPU the reference runs. `linear` and `grouped_linear` are torch custom
ops: they work on fake tensors, in `torch.compile` and, once called, in CUDA graphs.
"""

import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .errors import KernelInputError
from .expand import expand
from .formats import Format, PackedWeight
from .sparse_gather import MOST_TOKENS, sparse_gather, supports
from .sparse_gemv import sparse_gemv
from .sparse_matmul import sparse_matmul

MANY = 256
"""Tokens above which decoding for every 128 of them costs more than expanding once (an H100)."""

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_lock = threading.Lock()


def linear(
    x: Tensor, weight: PackedWeight, residual: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """(x weight^T + residual) * scale, from [..., K] to [..., R], in the dtype of `x`.

    As `reference.linear`, on the device of `x`. Raises `KernelInputError` if something does not
    fit.
    """
    _check(x, weight, residual)
    result: Tensor = torch.ops.conclave.linear(
        x,
        weight.codes,
        weight.positions,
        weight.scales,
        str(weight.format),
        weight.rows,
        residual,
        scale,
    )
    return result


def grouped_linear(x: Tensor, weight: PackedWeight, experts: Tensor) -> Tensor:
    """[T, K] to [T, R], token t by the weight `experts[t]` (int32 [T]) of the stack.

    One launch, in which each token reads its expert's weight: made for few tokens, the one with
    its eight experts above all. Raises `KernelInputError` if something does not fit.
    """
    _check(x, weight, None)
    if x.dim() != 2 or experts.shape != x.shape[:1] or experts.dtype != torch.int32:
        raise KernelInputError(
            f"x is {tuple(x.shape)} and experts {experts.dtype} {tuple(experts.shape)}; "
            "they must be [T, K] and int32 [T]"
        )
    if weight.experts is None:
        raise KernelInputError("the weight is a single one; grouped_linear takes a stack")
    tensors = (weight.codes, weight.positions, weight.scales)
    result: Tensor = torch.ops.conclave.grouped_linear(
        x, *tensors, str(weight.format), weight.rows, experts
    )
    return result


def _check(x: Tensor, weight: PackedWeight, residual: Tensor | None) -> None:
    if x.shape[-1] != weight.columns:
        raise KernelInputError(f"x is {tuple(x.shape)}; the weight has {weight.columns} columns")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and tensor.device != weight.device:
            raise KernelInputError(f"{name} is on {tensor.device}, the weight on {weight.device}")
    wanted = (*x.shape[:-1], weight.rows)
    if residual is not None and tuple(residual.shape) != wanted:
        raise KernelInputError(f"the residual is {tuple(residual.shape)}; it must be {wanted}")


@torch.library.custom_op("conclave::linear", mutates_args=())
def _linear(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    residual: Tensor | None,
    scale: float,
) -> Tensor:
    weight = PackedWeight(Format.parse(format), rows, x.shape[-1], codes, positions, scales)
    if x.device.type != "cuda":
        return reference.linear(x, weight, residual, scale)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    added = None if residual is None else residual.reshape(-1, rows).contiguous().to(x.dtype)
    out = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
    if len(flat):
        _multiply(flat, weight, out, added, scale)
    return out.view(*x.shape[:-1], rows)


@_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    residual: Tensor | None,
    scale: float,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _multiply(
    x: Tensor, weight: PackedWeight, out: Tensor, residual: Tensor | None, scale: float
) -> None:
    """(x weight^T + residual) * scale into `out`, all on a card."""
    fast = supports(weight.format, weight.columns)
    amd = torch.version.hip is not None
    if fast and len(x) <= MOST_TOKENS:
        (sparse_gather if amd else sparse_gemv)(x, weight, out, residual, scale)
    elif fast and len(x) <= MANY and x.dtype == torch.bfloat16 and not amd:
        sparse_matmul(x, weight, out, residual, scale)
    else:
        dense = expand(weight, _expanded(weight, x.dtype))
        product = F.linear(x, dense)
        if residual is not None:
            product = product.float() + residual
        torch.mul(product, scale, out=out)


def _expanded(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Scratch memory for the dense weight, as large as the largest so far."""
    size = weight.rows * weight.columns
    key = (weight.device, dtype)
    with _lock:
        memory = _scratch.get(key)
        if memory is None or len(memory) < size:
            if torch.cuda.is_current_stream_capturing():
                raise KernelInputError("call the layer once before a CUDA graph records it")
            memory = _scratch[key] = torch.empty(size, dtype=dtype, device=weight.device)
    return memory[:size].view(weight.rows, weight.columns)


@torch.library.custom_op("conclave::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    experts: Tensor,
) -> Tensor:
    weight = PackedWeight(Format.parse(format), rows, x.shape[-1], codes, positions, scales)
    if x.device.type != "cuda" or not supports(weight.format, weight.columns):
        return reference.grouped_linear(x, weight, experts)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    if len(x):
        op = sparse_gather if torch.version.hip is not None else sparse_gemv
        op(x.contiguous(), weight, out, experts=experts.contiguous())
    return out


@_grouped_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    experts: Tensor,
) -> Tensor:
    return x.new_empty((len(x), rows))
