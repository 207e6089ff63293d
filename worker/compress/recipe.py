"""Which weight is stored in which format, and what became of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Self

from ...kernels.formats import GROUPS, Format
from ..errors import ConfigError
from ..knobs import WORKERS_OWN, Knobs
from .allocation import Sensitivity, allot
from .pruning import Mode


@dataclass(frozen=True, slots=True)
class Recipe:
    """How each weight is to be stored."""

    format: Format | None
    """Of what is no exception; None leaves it as it is."""
    mode: Mode
    exceptions: dict[str, Format | None] = field(default_factory=dict)
    """Formats of weights whose whole name fits a pattern, such as `layers.0.*`; the last that fits
    counts."""
    embeddings: Format | None = None
    """Of embeddings and head, if they are no exceptions; see `of_table`."""
    whole: bool = False
    """Scales of 4-bit formats are whole numbers of their row's unit, but those of embeddings."""

    @classmethod
    def from_knobs(
        cls,
        knobs: Knobs,
        mode: Mode = "sparsegpt",
        exceptions: Mapping[str, Format | None] | None = None,
    ) -> Self:
        """As the knobs say, with one N of 16 for all weights; `allotted` finds one for each.

        Raises ConfigError if they leave everything as it is, or are about memory.
        """
        for name in ("max_error", *WORKERS_OWN):
            if getattr(knobs, name) is not None:
                raise ConfigError(f"{name} is a knob of engines, not of compression: leave it out")
        if knobs.weight_format is None:
            raise ConfigError(
                "these knobs compress nothing: give a sparsity above 0, or weight_bits of 4 or 8"
            )
        return cls(Format.parse(knobs.weight_format), mode, dict(exceptions or {}))

    def of(self, name: str) -> Format | None:
        """The format of a layer's weight, such as `layers.3.attention.qkv.weight`."""
        return self._of(name, self.format)

    def of_table(self, name: str, columns: int) -> Format | None:
        """The format of an embedding or head: with smaller groups than `embeddings` has where those
        do not divide the columns; None if none do."""
        wanted = self.embeddings
        return self._of(name, None if wanted is None else _fitted(wanted, columns))

    def _of(self, name: str, otherwise: Format | None) -> Format | None:
        fitting = [own for pattern, own in self.exceptions.items() if fnmatchcase(name, pattern)]
        return fitting[-1] if fitting else otherwise


def _fitted(format: Format, columns: int) -> Format | None:
    fitting = [group for group in GROUPS if group <= format.group and columns % group == 0]
    return replace(format, group=max(fitting)) if fitting else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one weight."""

    name: str
    format: str
    error: float
    """|x (w - w')^T|^2 / |x w^T|^2 over the calibration's inputs x; of experts, their mean. Of
    embeddings and head, which are rounded without regard to inputs, |w - w'|^2 / |w|^2."""
    inputs: int
    """Inputs seen; of experts, by the one that saw fewest; of embeddings and head none."""
    by_weights_alone: int
    """Experts that saw too few inputs."""


def _kind(name: str) -> str:
    """The name of a weight; of experts', without the layer's number."""
    parts = name.split(".")
    return ".".join(parts[2:]) if "experts" in parts else name


def allotted(
    recipe: Recipe,
    found: Mapping[str, Sensitivity],
    sparsity: float,
    experts_alike: bool = True,
) -> Recipe:
    """A recipe that prunes `sparsity` on average of what the given one does not except.

    If `experts_alike`, those of all layers have the same N, as slots of single experts want it.
    Raises ConfigError if its format is dense or the average is out of reach.
    """
    format = recipe.format
    if format is None or format.dense:
        raise ConfigError(f"--sparsity needs a format N:16, not {format}")
    own = {name: each for name, each in found.items() if recipe.of(name) == format}
    chosen = allot(own, sparsity, _kind if experts_alike else str)
    formats = {name: replace(format, kept=kept) for name, kept in chosen.items()}
    return replace(recipe, exceptions={**recipe.exceptions, **formats})
