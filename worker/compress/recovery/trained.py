"""A weight that is trained in the form in which it will be stored: map, integers, scales.

Rounding has no slope, so gradients pass it as if it were not there (straight-through: Bengio et al.
2013, arXiv:1308.3432); scales learn by what they would change in the rounded weight (LSQ: Esser et
al. 2020, arXiv:1902.08153), as logarithms, so that one learning rate does for all sizes.

The map may be learned too, for a time: weights that are pruned have gradients as if they were not,
and of each 16 the largest survive (SR-STE: Zhou et al. 2021, arXiv:2102.04010). Pruned ones decay,
so that they come back by what they were wanted for lately.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ....kernels.formats import SPAN, Format, PackedWeight
from ....kernels.integer.weights import is_whole, whole_scales
from ....kernels.layouts import mask_of, pack, scales_of
from ...model.decoder import Decoder
from ...model.packed import packed_order, plain_order

LEAK = 0.9
"""Of a pruned weight's value, what stays of it from one choice of survivors to the next."""


class Stored(nn.Module):
    """Maps the values that are trained, [E?, R, K], to the weight that is stored; it has the map.

    `kept` survivors of each 16 are let through: `format.kept` of them in the end, and more while
    sparsity is rising, the larger ones first.
    """

    order: Tensor
    scales: Tensor
    kept: Tensor
    learns: Tensor

    def __init__(
        self,
        name: str,
        packed: PackedWeight,
        original: Tensor,
        mask: Tensor | None = None,
        remapped: bool = False,
    ) -> None:
        super().__init__()
        self.remapped = remapped
        """Whether the map is ever learned; while it is, `learns` is true."""
        self.name = name
        self.format: Format = packed.format
        # No plain number: compiled code is made for the one it has met.
        kept = torch.tensor(packed.format.kept, dtype=torch.uint8, device=packed.device)
        self.register_buffer("kept", kept, persistent=False)
        learns = torch.tensor(remapped, device=packed.device)
        self.register_buffer("learns", learns, persistent=False)
        order = _order(plain_order(name, mask_of(packed)), original)
        if mask is not None:
            order = order.masked_fill(~mask, SPAN)
        self.register_buffer("order", order, persistent=False)
        self.growth: nn.Parameter | None = None
        if packed.scales is not None:
            scales = plain_order(name, scales_of(packed).float())
            # A group that was all zeros may come to life.
            least = scales[scales > 0].min() if bool((scales > 0).any()) else scales.new_ones(())
            self.register_buffer("scales", scales.clamp(min=least), persistent=False)
            self.growth = nn.Parameter(torch.zeros_like(scales))
        self.whole = is_whole(packed)
        """Whether scales are whole numbers of units, and stay it."""

    def forward(self, values: Tensor) -> Tensor:
        """float32 [E?, R, K], exactly as `repacked` will hold it."""
        survives = self.order < self.kept
        if self.growth is None:
            stored = _bfloat16(values) * survives
        else:
            scales, limit = self._current(self.growth)[..., None], 2 ** (self.format.bits - 1)
            steps = values.unflatten(-1, (-1, self.format.group)) / scales
            stored = (_round(steps.clamp(-limit, limit - 1)) * scales).flatten(-2) * survives
        if self.remapped:
            stored = _also_taught(stored, values, self.learns & ~survives)
        return stored

    def remap(self, values: Tensor) -> None:
        """Choose the survivors anew: of each 16 the largest of `values`, what is trained."""
        with torch.no_grad():
            values.mul_(torch.where(self.order < self.kept, 1.0, LEAK))
            self.order.copy_(_places(values.abs()))

    def repacked(self, values: Tensor) -> PackedWeight:
        """What is stored of the trained values."""
        mask = packed_order(self.name, self.order < self.format.kept)
        scales = None
        if self.growth is not None:
            own = packed_order(self.name, self._current(self.growth.detach()))
            scales = own.transpose(-1, -2)
        weight = packed_order(self.name, values.detach())
        return pack(weight.contiguous(), self.format, mask=mask, scales=scales)

    def _current(self, growth: Tensor) -> Tensor:
        """float32 [E?, R, G]."""
        scales = self.scales * growth.exp()
        return _whole(scales) if self.whole else _bfloat16(scales)


def train_packed(
    decoder: Decoder,
    packed: Mapping[str, PackedWeight],
    values: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    remapped: bool = False,
) -> dict[str, Stored]:
    """Let `decoder`, whose weights are plain, train the `packed` ones in the form they have.

    `values`, by the same names, tell what to keep longest while sparsity is rising. `masks`, bool
    [E?, R, K], are for patterns that no format knows: what they leave out is stored as zero. If it
    is to be `remapped`, the maps are trained until `learns` is false. Every other parameter is
    trained as it is. Returns what holds the maps and scales.
    """
    stored = {}
    for name, weight in packed.items():
        path, _, attribute = name.rpartition(".")
        own = Stored(name, weight, values[name], masks.get(name), remapped)
        module = decoder.get_submodule(path)
        parametrize.register_parametrization(module, attribute, own, unsafe=True)
        stored[name] = own
    return stored


def trained_values(decoder: Decoder, name: str) -> nn.Parameter:
    """The parameter behind a weight that `train_packed` was given."""
    path, _, attribute = name.rpartition(".")
    parameter: nn.Parameter = decoder.get_submodule(path).parametrizations[attribute].original  # type: ignore[index,union-attr]
    return parameter


def _order(mask: Tensor, original: Tensor) -> Tensor:
    """uint8 [E?, R, K]: place of each weight among its 16; survivors first, then by magnitude."""
    strength = original.abs().float() / original.abs().max().clamp(min=1e-30) + mask * 2.0
    return _places(strength)


def _places(strength: Tensor) -> Tensor:
    """uint8 [E?, R, K]: place of each among its 16, the strongest first, then as they stand."""
    falling = strength.unflatten(-1, (-1, SPAN)).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(SPAN, dtype=torch.uint8, device=strength.device).expand_as(falling)
    order = torch.empty_like(falling, dtype=torch.uint8).scatter_(-1, falling, places)
    return order.flatten(-2)


def _round(values: Tensor) -> Tensor:
    rounded: Tensor = _Replaced.apply(values, values.detach().round())  # type: ignore[no-untyped-call]
    return rounded


def _bfloat16(values: Tensor) -> Tensor:
    rounded: Tensor = _Replaced.apply(values, values.detach().bfloat16().float())  # type: ignore[no-untyped-call]
    return rounded


def _whole(scales: Tensor) -> Tensor:
    near = whole_scales(scales.detach().transpose(-1, -2)).float().transpose(-1, -2)
    rounded: Tensor = _Replaced.apply(scales, near)  # type: ignore[no-untyped-call]
    return rounded


def _also_taught(stored: Tensor, values: Tensor, where: Tensor) -> Tensor:
    same: Tensor = _AlsoTaught.apply(stored, values, where)  # type: ignore[no-untyped-call]
    return same


class _Replaced(torch.autograd.Function):
    """The second for the first, whose gradient is as if nothing had happened.

    Adding the difference instead would round once more.
    """

    @staticmethod
    def forward(ctx: object, values: Tensor, instead: Tensor) -> Tensor:
        return instead.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _AlsoTaught(torch.autograd.Function):
    """The first; the second has its gradient where the third is true."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, values: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        return stored.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (where,) = ctx.saved_tensors
        return gradients[0], gradients[0] * where, None
