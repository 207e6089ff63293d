"""Which weight is stored in which format."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from ...kernels.formats import Format
from ..errors import ConfigError
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

    def of(self, name: str) -> Format | None:
        """The format of a weight, such as `layers.3.attention.qkv.weight`."""
        fitting = [own for pattern, own in self.exceptions.items() if fnmatchcase(name, pattern)]
        return fitting[-1] if fitting else self.format


def allotted(recipe: Recipe, found: Mapping[str, Sensitivity], sparsity: float) -> Recipe:
    """A recipe that prunes `sparsity` on average of what the given one does not except.

    Raises ConfigError if its format is dense or the average is out of reach.
    """
    format = recipe.format
    if format is None or format.dense:
        raise ConfigError(f"--sparsity needs a format N:16, not {format}")
    own = {name: each for name, each in found.items() if recipe.of(name) == format}
    chosen = allot(own, sparsity)
    formats = {name: replace(format, kept=kept) for name, kept in chosen.items()}
    return replace(recipe, exceptions={**recipe.exceptions, **formats})
