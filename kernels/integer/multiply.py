"""A weight with whole scales times many rows of activations, by one product of integers.

Rows become digits, the weight is written out as integers of 8 bits (`weights`), and one product
does for all rows, whatever became of them (`product`). That is for Hopper; elsewhere
`kernels.linear` multiplies exactly.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..expand import expand_integers
from ..formats import PackedWeight
from ..launching.targets import target_of
from ..scratch import MOST_EXPANDED, scratch
from .digits import TALL, fits, to_digits
from .product import product
from .weights import row_units


def supports(weight: PackedWeight) -> bool:
    """Whether products of integers are made with weights of this format and shape."""
    return (
        weight.format.bits == 4
        and weight.experts is None
        and fits(weight.columns)
        and weight.rows % 16 == 0
        and weight.rows * weight.columns <= MOST_EXPANDED
    )


def on_hopper(device: torch.device) -> bool:
    """Whether there is a kernel for the device."""
    return device.type == "cuda" and target_of(device.index or 0).is_hopper


def multiply(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    scale: float,
    gated: bool,
    max_error: float,
) -> None:
    """`linear` or `gated_linear` into `out`, of rows of `x` [T, K] within `max_error`.

    All are bfloat16, contiguous and on a Hopper card. `supports` says yes to the weight, whose
    scales are whole; that is not checked, as it would have to be waited for.
    """
    units = row_units(weight)
    integers = scratch(weight, torch.int8)
    expand_integers(weight, units, integers)
    for part in _parts(*x.shape):
        added = None if residual is None else residual[part]
        rows = to_digits(x[part], max_error)
        product(rows, integers, units, out[part], added, scale, gated)


def _parts(tokens: int, columns: int) -> Iterator[slice]:
    """As many tokens at once as places among their digits are told in 32 bits; whole tiles."""
    step = (1 << 30) // columns // TALL * TALL
    return (slice(first, first + step) for first in range(0, tokens, step))
