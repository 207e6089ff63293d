"""Writes a compressed checkpoint, layer by layer; what was written survives being killed.

Every file is written under another name, flushed to the disk and renamed. Until `finish` the folder
has a progress.json in place of a conclave.json, so that nothing loads it; a writer made again for
the same folder, source and recipe goes on behind the layers that are finished.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.errors import LayoutError
from ...kernels.layouts import PackedWeight, validate
from ..errors import CheckpointError, ConfigError
from ..model.config import ModelConfig
from .contents import STORED_AS, Contents, check_tensors, file_of, layer_file
from .manifest import (
    COPIED,
    MANIFEST,
    PROGRESS,
    REST,
    VERSION,
    FileRecord,
    Manifest,
    WeightRecord,
    read_manifest,
)
from .reader import read_weights

Weights = Mapping[str, Tensor | PackedWeight]
"""By the decoder's names; what is packed has rows as of `model.packed.packed_order`."""

_PARTIAL = ".partial"
"""Ends the names of files that are being written."""


class CheckpointWriter:
    """One compressed checkpoint in the making.

    Raises:
        CheckpointError: the source has no config.json that can be run, or progress.json is broken.
        ConfigError: the folder holds something else: a finished checkpoint, foreign files, or one
            that was begun from another source or with another recipe.
    """

    def __init__(self, folder: Path, source: Path, recipe: str = "") -> None:
        """Begin in `folder`, or go on there; `recipe` tells what must be the same to go on."""
        self.folder = folder
        self.contents = Contents(ModelConfig.load(source))
        files = {name: source / name for name in COPIED if (source / name).is_file()}
        copies = {name: FileRecord.of(path) for name, path in files.items()}
        self._key = {"recipe": recipe}
        self._files, self._weights = self._begun(copies)
        self._write_manifest(PROGRESS, self._key)
        for name, path in files.items():
            replace_file(folder / name, partial(shutil.copyfile, path))

    def finished_layers(self) -> list[int]:
        """Layers that are written, their files read and found whole; others are to be written."""
        return [index for index in range(self.contents.layers) if self._whole(layer_file(index))]

    def has_rest(self) -> bool:
        """Whether `write_rest` is done, its file read and found whole."""
        return self._whole(REST)

    def write_layer(self, index: int, weights: Weights) -> None:
        """All weights of a decoder layer.

        Raises CheckpointError if they are not what the model has, or a packed one is not valid.
        """
        self._write(layer_file(index), weights)

    def read_layer(self, index: int) -> dict[str, Tensor | PackedWeight]:
        """What `write_layer` was given for a finished layer, on the CPU.

        Raises CheckpointError if the file is not there as it was written.
        """
        file = layer_file(index)
        if file not in self._files:
            raise CheckpointError(f"{self.folder / file} has not been written yet")
        path, cpu = self.folder / file, torch.device("cpu")
        return read_weights(path, self._files[file], self.contents, self._weights, cpu)

    def write_rest(self, weights: Weights) -> None:
        """All weights outside the layers; see `write_layer`."""
        self._write(REST, weights)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write conclave.json, with `about` (JSON values) in it; from now on the folder loads.

        Reads all files once more. Raises CheckpointError if one is not there as it was written.
        """
        names = self.contents.files.keys() | self._files.keys()
        if missing := sorted(name for name in names if not self._whole(name)):
            raise CheckpointError(
                f"{self.folder}: not written yet, or damaged since: {', '.join(missing)}; "
                "run it again, and these are made anew"
            )
        self._write_manifest(MANIFEST, about)
        (self.folder / PROGRESS).unlink()

    def _begun(
        self, copies: dict[str, FileRecord]
    ) -> tuple[dict[str, FileRecord], dict[str, WeightRecord]]:
        """Files and weights of a folder that is ours to write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / MANIFEST).exists():
            raise ConfigError(
                f"{self.folder} holds a finished checkpoint: remove it or name another folder"
            )
        if not (self.folder / PROGRESS).exists():
            if any(path.suffix != _PARTIAL for path in self.folder.iterdir()):
                raise ConfigError(f"{self.folder} is not empty: name a new folder")
            return copies, {}
        begun = read_manifest(self.folder / PROGRESS)
        if begun.about != self._key or any(
            begun.files.get(name) != copy for name, copy in copies.items()
        ):
            raise ConfigError(
                f"{self.folder} was begun by another run, with another source or settings: "
                "go on with those, remove it, or name another folder"
            )
        self.contents.check_weights(begun.weights, str(self.folder / PROGRESS))
        ours = self.contents.files.keys() | copies.keys()
        return {name: begun.files[name] for name in ours & begun.files.keys()}, dict(begun.weights)

    def _whole(self, name: str) -> bool:
        """Whether a file is there as it was written."""
        try:
            return self._files.get(name) == FileRecord.of(self.folder / name)
        except OSError:
            return False

    def _write(self, file: str, weights: Weights) -> None:
        packed = {name: value for name, value in weights.items() if not isinstance(value, Tensor)}
        records = {name: WeightRecord.of(weight) for name, weight in packed.items()}
        _check(packed)
        self.contents.check_weights(records, file)
        tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
        for name, weight in packed.items():
            tensors |= {f"{name}.{field}": value for field, value in weight.tensors().items()}
        found = {
            name: (tuple(value.shape), STORED_AS.get(value.dtype, str(value.dtype)))
            for name, value in tensors.items()
        }
        check_tensors(file, found, self.contents.tensors(file, records))
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        record = replace_file(self.folder / file, lambda path: save_file(plain, path))
        self._files[file] = record
        kept = {name: old for name, old in self._weights.items() if file_of(name) != file}
        self._weights = kept | records
        self._write_manifest(PROGRESS, self._key)

    def _write_manifest(self, name: str, about: Mapping[str, Any]) -> None:
        manifest = Manifest(
            version=VERSION, files=self._files, weights=self._weights, about=dict(about)
        )
        replace_file(self.folder / name, lambda path: path.write_text(manifest.text()))


def _check(packed: Mapping[str, PackedWeight]) -> None:
    for name, weight in packed.items():
        try:
            validate(weight)
        except LayoutError as error:
            raise CheckpointError(f"{name} cannot be written: {error}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> FileRecord:
    """Put a file into place that `write` makes, whole or not at all."""
    unfinished = path.with_name(path.name + _PARTIAL)
    unfinished.touch()
    mode = unfinished.stat().st_mode
    write(unfinished)
    unfinished.chmod(mode)  # safetensors makes files that nobody else may read
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    record = FileRecord.of(unfinished)
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the name could be lost where the content is not
    finally:
        os.close(folder)
    return record
