"""Weights of 4 bits as integers of 8, where each scale is a whole number times its row's unit.

weight = code * scale = unit * (code * multiple), with multiples of 1 to 15: code * multiple is
-120..105, an integer of 8 bits, and one product of integers is left with one number a row. Scales
stay what they were to everybody else. The largest of a row is always 15 units, so units follow from
scales. They have four significant bits, as multiples do, so that bfloat16 holds scales exactly.

It gave up 8-bit formats: their codes leave no room for multiples.
"""

from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import LayoutError
from ..formats import TILE, Format, PackedWeight
from ..launching.launch import Kernel, Variant
from ..launching.targets import HOPPER
from ..layouts import pack

MOST = 15
"""Units in the largest scale of a row."""
_MOST = tl.constexpr(float(MOST))
_TILE = tl.constexpr(TILE)
_ULPS = 1 << 20
"""Of float32 in the last of four significant bits."""


class Ruler(NamedTuple):
    """What each row's scales are multiples of."""

    units: Tensor
    """float32 [..., R], of four significant bits."""
    largest: Tensor
    """int64 [..., R]: the group whose scale is 15 units, so that units follow from scales."""

    @classmethod
    def of(cls, scales: Tensor) -> Self:
        """The units that 15 of are nearest to the largest scale of a row; `scales` [..., G, R]."""
        most, largest = scales.float().max(-2)
        bits = (most / MOST).view(torch.int32)
        return cls(((bits + _ULPS // 2) // _ULPS * _ULPS).view(torch.float32), largest)

    def nearest(self, scales: Tensor, group: int, beside: int = 0) -> Tensor:
        """float32 [..., R]: the scales of a group as the nearest multiples, 1 to 15.

        Or so many units beside it, but for the group whose scale is 15.
        """
        multiples = torch.where(self.units > 0, scales.float() / self.units, 0.0).round() + beside
        whole = torch.where(self.largest == group, MOST, multiples.clamp(1, MOST))
        return whole * self.units


def pack_whole(weight: Tensor, format: Format, mask: Tensor | None = None) -> PackedWeight:
    """As `layouts.pack`, a weight in a 4-bit format with scales that are whole."""
    first = pack(weight, format, mask)
    assert first.scales is not None, f"{format} has no scales"
    return pack(weight, format, mask, whole_scales(first.scales))


def whole_scales(scales: Tensor) -> Tensor:
    """bfloat16 scales [..., G, R] near `scales` that are whole: 1 to 15 units of their row.

    The largest of a row becomes 15 units, the others the nearest number; a row of zeros stays one.
    """
    ruler = Ruler.of(scales)
    groups = [ruler.nearest(own, group) for group, own in enumerate(scales.unbind(-2))]
    return torch.stack(groups, -2).bfloat16()


def is_whole(weight: PackedWeight) -> bool:
    """Whether a weight of a 4-bit format has whole scales; waits for the device."""
    if weight.format.bits != 4 or weight.scales is None:
        return False
    scales = weight.scales.float()
    units = Ruler.of(scales).units[..., None, :]
    multiples = torch.where(units > 0, scales / units, 0.0).round()
    return bool((multiples * units == scales).all())


@triton.jit
def _row_units(units, scales, groups, GROUPS: tl.constexpr):
    """The units of a tile of rows."""
    tile = tl.program_id(0)
    row = tl.arange(0, _TILE)
    group = tl.arange(0, GROUPS)
    place = (tile * groups + group)[:, None] * _TILE + row[None, :]
    own = tl.load(scales + place, mask=(group < groups)[:, None], other=0.0)
    tl.store(units + tile * _TILE + row, tl.max(own.to(tl.float32), 0) / _MOST)


_kernel = Kernel(_row_units, grid="tiles")


def row_units(weight: PackedWeight) -> Tensor:
    """The units of a single weight with whole scales, float32 [R'], on its card."""
    if weight.scales is None or weight.experts is not None:
        raise LayoutError(f"{weight.format} of shape {weight.shape} has no units")
    tiles, groups, _ = weight.scales.shape
    units = torch.empty(tiles * TILE, dtype=torch.float32, device=weight.device)
    constants = {"GROUPS": triton.next_power_of_2(groups)}
    _kernel.launch((tiles,), units, weight.scales, groups, constants=constants, warps=8)
    return units


def variants() -> Iterator[Variant]:
    """What the bundle holds: up to 32,768 columns in groups of 64."""
    for bits in range(1, 10):
        types, constants = ("*fp32", "*bf16", "i32"), {"GROUPS": 1 << bits}
        yield Variant(_kernel, types, constants, warps=8, targets=HOPPER)
