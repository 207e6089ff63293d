"""Embeddings and head, packed: rounded to the nearest, group by group.

More than half of a small model's memory is in them (of E2B's 9.3 GB 5.5), and the head is read at
every step. int8 in groups of 64 is off by 0.6 % of normally distributed weights (root mean square).
What it gave up: calibration. A row is looked up for itself, so nothing can make up for its errors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.errors import LayoutError
from ...kernels.formats import Format, PackedWeight, from_tensors
from ...kernels.layouts import pack, unpack
from ..errors import ConfigError
from ..model.decoder import Decoder
from ..model.packed import tables
from .recipe import Outcome, Recipe

_ROWS = 1 << 14
"""Rows that are packed at once, whole tiles."""


def pack_tables(
    rest: Decoder, recipe: Recipe, maps: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, PackedWeight], list[Outcome]]:
    """Pack what the recipe wants of `rest`, a decoder without its layers, by name.

    `rest` then has the rounded values, for what follows to see. `maps` tell of some who survives.
    Packed are some rows at a time, on `device`. Raises ConfigError for a format that does not fit.
    """
    packed: dict[str, PackedWeight] = {}
    outcomes = []
    for (name,) in tables(rest).values():
        plain = rest.get_parameter(name)
        format = recipe.of_table(name, plain.shape[1])
        if format is None:
            if recipe.embeddings is not None:
                outcomes.append(Outcome(name, "as it was", 0.0, 0, 0))
            continue
        try:
            packed[name], error = _rounded(plain.detach(), format, maps.get(name), device)
        except LayoutError as problem:
            raise ConfigError(
                f"{name} cannot be stored as {format}: {problem}; leave it as it is (--keep), or "
                "choose another format"
            ) from problem
        outcomes.append(Outcome(name, str(format), error, 0, 0))
    return packed, outcomes


def _rounded(
    plain: Tensor, format: Format, mask: Tensor | None, device: torch.device
) -> tuple[PackedWeight, float]:
    """`plain` [R, K] as it is stored, with that put in its place, and `Outcome.error`."""
    parts: list[dict[str, Tensor]] = []
    off = whole = 0.0
    for first in range(0, len(plain), _ROWS):
        rows = slice(first, first + _ROWS)
        own = plain[rows].to(device)
        part = pack(own, format, None if mask is None else mask[rows].to(device))
        stored = unpack(part)
        off += float((own - stored).square().sum())
        whole += float(own.square().sum())
        plain[rows] = stored.to(plain.device)
        parts.append({kind: tensor.to(plain.device) for kind, tensor in part.tensors().items()})
    tensors = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
    return from_tensors(format, len(plain), plain.shape[1], tensors), off / whole
