"""sparsity.safetensors: which weights of a checkpoint survive, a bit each.

    NAME.bitmask   uint8 [..., R, ceil(K/8)]: column 8j + i of a row is bit i of byte j, 1 survives
    NAME.shape     int64, the shape of NAME
    NAME.scale     bfloat16 [..., R, K/group] \\ of a weight of integers that is written as plain
    NAME.bits      int64 [1]: 4 or 8          / values: what its integers are to be found with

Names are those of the tensors in the checkpoint itself; `bitmask` and `shape` are as in
compressed-tensors' `sparse-bitmask`, whose other fields are ignored. The file stands apart from the
shards, since their loaders would stumble over it. What it gave up: while they are collected, the
maps of the whole model lie in memory, a 16th of its bfloat16 form.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ....kernels.formats import SPAN
from ...errors import CheckpointError
from ..checkpoint import replace_file
from ..manifest import FileRecord
from .names import bare_name

FILE = "sparsity.safetensors"
_VERSION_KEY, _VERSION = "conclave_version", "1"
_FIELDS = ("bitmask", "shape", "scale", "bits", "compressed", "row_offsets")


class MapWriter:
    """Collects maps and writes them; names are the stored ones."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def add(self, name: str, mask: Tensor) -> None:
        """The map of a weight, bool [..., R, K]."""
        powers = (1 << torch.arange(8)).to(torch.uint8)
        padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
        octets = padded.unflatten(-1, (-1, 8))
        self._tensors[f"{name}.bitmask"] = (octets * powers).sum(-1, dtype=torch.uint8)
        self._tensors[f"{name}.shape"] = torch.tensor(mask.shape)

    def add_scales(self, name: str, scales: Tensor, bits: int) -> None:
        """What the integers of a weight that is written as plain values are found with."""
        self._tensors[f"{name}.scale"] = scales
        self._tensors[f"{name}.bits"] = torch.tensor([bits])

    def write(self, folder: Path) -> FileRecord:
        """Put the file into place."""
        metadata = {_VERSION_KEY: _VERSION}
        return replace_file(folder / FILE, partial(save_file, self._tensors, metadata=metadata))


class Maps:
    """The maps of a model whose tensors are `shapes` by bare name; close it, or use it in a `with`.

    `path` None is a file without maps. Raises CheckpointError, which names the tensor, for a file
    that cannot be read, or that is not of this model.
    """

    def __init__(self, path: Path | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._path = path
        self._shapes = shapes
        self._stored: dict[tuple[str, str], str] = {}
        with ExitStack() as stack:
            if path is not None:
                self._file = stack.enter_context(_opened(path))
                for stored in self._file.keys():
                    self._list(stored)
                self._check()
            self._files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def mask(self, name: str) -> Tensor | None:
        """The map of a weight, bool and of its shape; None if it has none."""
        stored = self._stored.get((name, "bitmask"))
        if stored is None:
            return None
        octets = self._file.get_tensor(stored)
        mask = torch.empty(self._shapes[name], dtype=torch.bool)
        for bit in range(8):
            columns = mask[..., bit::8]
            columns.copy_((octets >> bit & 1)[..., : columns.shape[-1]])
        return mask

    def scales(self, name: str) -> tuple[Tensor, int] | None:
        """Scales (bfloat16, still to be checked) and bits of a weight; None if it has none."""
        stored = self._stored.get((name, "scale"))
        if stored is None:
            return None
        bits = int(self._file.get_tensor(self._stored[name, "bits"]))
        if bits not in (4, 8):
            raise CheckpointError(f"{self._path}: {name} has codes of {bits} bits, not of 4 or 8")
        return self._file.get_tensor(stored), bits

    def _list(self, stored: str) -> None:
        whole, _, field = stored.rpartition(".")
        name = bare_name(whole)
        if name is None:
            return
        if field not in _FIELDS or name not in self._shapes or (name, field) in self._stored:
            raise CheckpointError(
                f"{self._path}: {stored!r} is of no weight of this model: take the maps that "
                "belong to the checkpoint"
            )
        self._stored[name, field] = stored

    def _check(self) -> None:
        for name, field in self._stored:
            shape = self._shapes[name]
            found = self._header(name, field)
            if field == "bitmask":
                right = ((*shape[:-1], -(-shape[-1] // 8)), "U8")
                fits = len(shape) > 1 and found == right and self._has_shape(name)
            elif field == "scale":
                (*rows, groups), dtype = found
                fits = (*rows,) == shape[:-1] and dtype == "BF16" and len(shape) > 1
                fits = fits and groups in {shape[-1] // each for each in (32, 64, 128)}
                fits = fits and not shape[-1] % groups and (name, "bits") in self._stored
            else:
                fits = field != "bits" or found == ((1,), "I64")
            if not fits:
                raise CheckpointError(
                    f"{self._path}: {self._stored[name, field]} does not fit {name} "
                    f"{list(shape)}: take the maps that belong to the checkpoint"
                )

    def _has_shape(self, name: str) -> bool:
        """Whether NAME.shape says what config.json does."""
        shape = self._shapes[name]
        if (name, "shape") not in self._stored:
            return False
        if self._header(name, "shape") != ((len(shape),), "I64"):
            return False
        return tuple(self._file.get_tensor(self._stored[name, "shape"]).tolist()) == shape

    def _header(self, name: str, field: str) -> tuple[tuple[int, ...], str]:
        header = self._file.get_slice(self._stored[name, field])
        return tuple(header.get_shape()), header.get_dtype()


def kept_of(mask: Tensor) -> int | None:
    """How many of each 16 columns survive, if it is the same number everywhere."""
    if mask.shape[-1] % SPAN:
        return None
    counts = mask.unflatten(-1, (-1, SPAN)).sum(-1, dtype=torch.uint8)
    first = int(counts.flatten()[0])
    return first if bool((counts == first).all()) else None


def _opened(path: Path) -> Any:
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: name a file of maps") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error})") from error
    version = (file.metadata() or {}).get(_VERSION_KEY, _VERSION)
    if version != _VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, and this Conclave reads version {_VERSION}: "
            "use the release that wrote it"
        )
    return file
