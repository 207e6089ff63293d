"""Linear layers by products of integers, for prompts: activations within an error that is told.

For weights with whole scales (`weights`), on Hopper: rows become digits, the weight is written out
as integers of 8 bits, and one product does for all rows (`product`). Elsewhere `kernels.linear`
does it, whose activations are exact; on a CPU the reference of this does, so that results can be
compared. `integer_linear` is a torch custom op, as those of `kernels.linear` are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import linear as exact
from ..expand import expand_integers
from ..formats import Format, PackedWeight
from ..launching.targets import target_of
from ..scratch import scratch
from . import reference
from .digits import TALL, fits, to_digits
from .product import product
from .weights import row_units


def integer_linear(
    x: Tensor,
    weight: PackedWeight,
    max_error: float,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """As `linear`, of rows of `x` within `max_error`: ||x - seen|| / ||x||.

    The weight has whole scales (`weights.is_whole`), which is not checked. Raises
    `KernelInputError` if something does not fit.
    """
    exact.check(x, weight, residual, False)
    result: Tensor = torch.ops.conclave.integer_linear(
        x, *exact.fields(weight), max_error, residual, scale, False
    )
    return result


def integer_gated_linear(x: Tensor, weight: PackedWeight, max_error: float) -> Tensor:
    """As `gated_linear`, of rows of `x` within `max_error`."""
    exact.check(x, weight, None, True)
    result: Tensor = torch.ops.conclave.integer_linear(
        x, *exact.fields(weight), max_error, None, 1.0, True
    )
    return result


@torch.library.custom_op("conclave::integer_linear", mutates_args=())
def _integer_linear(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    max_error: float,
    residual: Tensor | None,
    scale: float,
    gated: bool,
) -> Tensor:
    weight = PackedWeight(Format.parse(format), rows, x.shape[-1], codes, positions, scales)
    if not x.is_cuda:
        if gated:
            return reference.integer_gated_linear(x, weight, max_error)
        return reference.integer_linear(x, weight, max_error, residual, scale)
    if not (supports(weight) and x.dtype == torch.bfloat16 and on_hopper(x.device)):
        if gated:
            return exact.gated_linear(x, weight)
        return exact.linear(x, weight, residual, scale)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    added = None if residual is None else residual.reshape(-1, rows).contiguous().to(x.dtype)
    out = torch.empty(len(flat), rows // 2 if gated else rows, dtype=x.dtype, device=x.device)
    if len(flat):
        units = row_units(weight)
        integers = scratch(weight, torch.int8)
        expand_integers(weight, units, integers)
        for part in _parts(*flat.shape):
            own = None if added is None else added[part]
            rows_in_digits = to_digits(flat[part], max_error)
            product(rows_in_digits, integers, units, out[part], own, scale, gated)
    return out.view(*x.shape[:-1], out.shape[1])


@_integer_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    max_error: float,
    residual: Tensor | None,
    scale: float,
    gated: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows // 2 if gated else rows))


def _parts(tokens: int, columns: int) -> Iterator[slice]:
    """As many tokens at once as places among their digits are told in 32 bits; whole tiles."""
    step = (1 << 30) // columns // TALL * TALL
    return (slice(first, first + step) for first in range(0, tokens, step))


def supports(weight: PackedWeight) -> bool:
    """Whether products of integers are made with weights of this format and shape."""
    return (
        weight.format.bits == 4
        and weight.experts is None
        and fits(weight.columns)
        and weight.rows % 16 == 0
        and weight.rows * weight.columns <= exact.MOST_EXPANDED
    )


def on_hopper(device: torch.device) -> bool:
    """Whether there is a kernel for the device."""
    if device.type != "cuda":
        return False
    return target_of(device.index or 0).is_hopper
