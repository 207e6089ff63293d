"""Embeddings and head, packed: rounded to the nearest, group by group.

More than half of a small model's memory is in them (of E2B's 9.3 GB 5.5), and the head is read at
every step. int8 in groups of 64 is off by 0.6 % of normally distributed weights (root mean square).
What it gave up: calibration. A row is looked up for itself, so nothing can make up for its errors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.errors import LayoutError
from ...kernels.formats import PackedWeight
from ...kernels.layouts import pack, rows_at
from ..errors import ConfigError
from ..model.decoder import Decoder
from ..model.packed import fill, tables
from .recipe import Outcome, Recipe

_ROWS = 4096
"""Rows whose error is found at once."""


def pack_tables(
    rest: Decoder, recipe: Recipe, maps: Mapping[str, Tensor]
) -> tuple[dict[str, PackedWeight], list[Outcome]]:
    """Pack what the recipe wants of `rest`, a decoder without its layers, by name.

    `rest` then has the rounded values, for what follows to see. `maps` tell of some who survives.
    Raises ConfigError for a format that does not fit.
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
            packed[name] = pack(plain.detach(), format, maps.get(name))
        except LayoutError as error:
            raise ConfigError(
                f"{name} cannot be stored as {format}: {error}; leave it as it is (--keep), or "
                "choose another format"
            ) from error
        outcomes.append(Outcome(name, str(format), _error(plain, packed[name]), 0, 0))
        fill(name, plain, packed[name])
    return packed, outcomes


def _error(plain: Tensor, packed: PackedWeight) -> float:
    """See `Outcome.error`."""
    off = whole = 0.0
    for index in torch.arange(packed.rows, device=plain.device).split(_ROWS):
        own = plain[int(index[0]) : int(index[-1]) + 1]
        off += float((own - rows_at(packed, index)).square().sum())
        whole += float(own.square().sum())
    return off / whole
