"""A compressed checkpoint as the pattern for another: the same formats, the same weights survive.

A model that is tuned further keeps its map, so that it can be compressed again in the same way, and
only values differ. Maps are read layer by layer, as they are needed.
"""

from pathlib import Path

import torch
from torch import Tensor

from ....kernels.formats import Format, PackedWeight
from ....kernels.layouts import mask_of
from ...errors import CheckpointError
from ...model.config import ModelConfig
from ..contents import Contents
from ..fingerprint import fingerprint
from ..pruning import Mode
from ..reader import read_list, read_weights
from ..recipe import Recipe


class Like:
    """The pattern, if it fits a model of `config`.

    Raises CheckpointError if it is no whole compressed checkpoint, or of a model of another shape,
    with the weight that differs.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._folder = folder
        self._manifest, self._contents = read_list(folder, ModelConfig.load(folder))
        _check_shapes(folder, self._contents.shapes, Contents(config).shapes)
        self.fingerprint = fingerprint(folder)

    def recipe(self, mode: Mode) -> Recipe:
        """Its formats, each weight's by name; what is plain in it is left as it is."""
        weights = self._manifest.weights.items()
        return Recipe(None, mode, {name: Format.parse(own.format) for name, own in weights})

    def maps(self, file: str) -> dict[str, Tensor]:
        """Which weights survive in the sparse ones of a file: bool, in packed order, by name."""
        weights = self._manifest.weights
        names = [name for name in self._contents.files[file] if name in weights]
        sparse = [name for name in names if not Format.parse(weights[name].format).dense]
        if not sparse:
            return {}
        path, record = self._folder / file, self._manifest.files[file]
        found = read_weights(path, record, self._contents, weights, torch.device("cpu"))
        packed = {name: own for name, own in found.items() if isinstance(own, PackedWeight)}
        return {name: mask_of(packed[name]) for name in sparse}


def _check_shapes(
    folder: Path, theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]
) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            there, here = (
                f"is {list(shapes[name])}" if name in shapes else "does not exist"
                for shapes in (theirs, ours)
            )
            raise CheckpointError(
                f"{name} {there} in {folder}, but {here} in the source: --like needs a compressed "
                "checkpoint of a model of the same shape"
            )
