"""A tensor of theirs whose values are integers times scales, rows as when plain.

What it gave up: zero points, and groups that columns do not fill.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """[R, K], or a stack [E, R, K]."""

    codes: Tensor
    """int8 [E?, R, K]."""
    scales: Tensor
    """bfloat16 [E?, R, K / group], finite and not negative."""
    bits: int
    """Of a code: 4 or 8."""

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale, which float32 holds exactly, then rounded to `dtype`."""
        grouped = self.codes.unflatten(-1, (-1, self.group))
        values: Tensor = (grouped * self.scales.float()[..., None]).flatten(-2).to(dtype)
        return values

    @classmethod
    def found_in(cls, values: Tensor, scales: Tensor, bits: int, name: str) -> Self:
        """The codes that once became `values` [E?, R, K]: even bfloat16 keeps 8 bits apart.

        CheckpointError, which names the weight, if there are none that give the same values.
        """
        stacked = values.dim() == 3
        codes = torch.empty(values.shape, dtype=torch.int8)
        # An expert after the other: float32 for all of them at once would be gigabytes.
        for own, scale, target in (
            zip(values, scales, codes, strict=True) if stacked else ((values, scales, codes),)
        ):
            width = own.shape[-1] // scale.shape[-1]
            steps = own.float().unflatten(-1, (-1, width))
            steps = steps / torch.where(scale > 0, scale.float(), 1.0)[..., None]
            limit = 2 ** (bits - 1)
            rounded = steps.round().clamp(-limit, limit - 1).nan_to_num(0.0).to(torch.int8)
            target.copy_(rounded.flatten(-2))
            if not torch.equal(cls(target, scale, bits).values(own.dtype), own):
                raise CheckpointError(
                    f"{name} is no longer what its scales in the file of maps belong to: give the "
                    "maps of these weights (--maps), or remove that file"
                )
        return cls(codes, scales, bits)


def checked_scales(scales: Tensor, name: str) -> Tensor:
    """As bfloat16, which must not change them; CheckpointError, which names the weight."""
    own = scales.bfloat16()
    if not bool((own.isfinite() & (own >= 0)).all()):
        raise CheckpointError(
            f"{name}: scales must be finite and not negative; fetch the checkpoint again"
        )
    if not torch.equal(own.to(scales.dtype), scales):
        raise CheckpointError(
            f"{name} has scales that bfloat16 would change, and they are not to be rounded: take "
            "the unquantized checkpoint and `conclave compress` it"
        )
    return own
