"""A decoder from a compressed checkpoint; whatever is not as conclave.json says is refused by name.

On a GPU packed weights go there as they are, and the dense ones are never made. On a CPU, which has
no kernels for them, they are unpacked into the decoder's plain parameters.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kernels.errors import LayoutError
from ...kernels.formats import Format, from_tensors, tensor_shapes
from ...kernels.layouts import PackedWeight, validate
from ..errors import CheckpointError
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.packed import fill, put_packed
from ..weights import Settle, allocate, blank_decoder, model_tensors
from .contents import Contents, check_tensors
from .manifest import COPIED, MANIFEST, PROGRESS, FileRecord, Manifest, WeightRecord, read_manifest


def is_compressed(folder: Path) -> bool:
    """Whether a folder is a compressed checkpoint of ours, be it a whole one or not."""
    return (folder / MANIFEST).exists() or (folder / PROGRESS).exists()


def check_settings(folder: Path) -> None:
    """CheckpointError unless the files that are not weights are as conclave.json says.

    For the time before they are read; `load_compressed` checks all others.
    """
    manifest = _manifest(folder)
    if "config.json" not in manifest.files:
        raise CheckpointError(f"{folder / MANIFEST} does not list config.json: copy it again")
    for name in COPIED:
        if name in manifest.files:
            check_file(folder / name, manifest.files[name])


def load_compressed(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    packed: bool | None = None,
    settle: Settle | None = None,
) -> Decoder:
    """The decoder of a compressed checkpoint, on `device`, its plain weights in `dtype`.

    `packed` tells whether packed weights stay so; None: on a GPU. `progress` is told (weights
    loaded, weights in all) after each file, `settle` called after each layer. Raises
    CheckpointError, which names the file or the tensor, if a file is missing, changed or too many,
    or tensors are not what the model needs.
    """
    manifest, contents = read_list(folder, config)
    if packed is None:
        packed = device.type != "cpu"
    decoder, done = blank_decoder(config), 0
    for index, file in enumerate(contents.files):
        path, record = folder / file, manifest.files[file]
        weights = read_weights(path, record, contents, manifest.weights, device)
        done += len(weights)
        if packed:
            _put(decoder, contents, weights, dtype)
        # A layer after the other: what stays packed must be in place before this is done.
        allocate(decoder.get_submodule(contents.parts[file]), device, dtype)
        _copy(weights, model_tensors(decoder))
        if settle is not None and contents.parts[file]:
            settle(decoder, index)
        if progress is not None:
            progress(done, len(contents.shapes))
    return decoder.eval()


def read_list(folder: Path, config: ModelConfig) -> tuple[Manifest, Contents]:
    """conclave.json and what the files that it lists must hold; those that are no weights are read.

    Raises CheckpointError, see `load_compressed`.
    """
    check_settings(folder)
    manifest, contents = _manifest(folder), Contents(config)
    _check_list(folder / MANIFEST, manifest, contents)
    return manifest, contents


def read_weights(
    path: Path,
    record: FileRecord,
    contents: Contents,
    weights: Mapping[str, WeightRecord],
    device: torch.device,
) -> dict[str, Tensor | PackedWeight]:
    """All weights of one file by name: packed ones, as `weights` has them, on `device`.

    Plain ones stay where the file is mapped. Raises CheckpointError, see `load_compressed`.
    """
    check_file(path, record)
    found: dict[str, Tensor | PackedWeight] = {}
    with _open(path) as file:
        headers = {name: _header(file, name) for name in file.keys()}
        check_tensors(str(path), headers, contents.tensors(path.name, weights))
        for name in contents.files[path.name]:
            if name in weights:
                found[name] = _read_packed(path, file, name, weights[name], device)
            else:
                found[name] = file.get_tensor(name)
    return found


def _put(
    decoder: Decoder,
    contents: Contents,
    weights: dict[str, Tensor | PackedWeight],
    dtype: torch.dtype,
) -> None:
    """Moves packed weights out of `weights` and into the modules that run from them."""
    packed = {name: each for name, each in weights.items() if isinstance(each, PackedWeight)}
    for module, names in contents.packable.items():
        if names[0] in packed:
            put_packed(decoder, module, [packed[name] for name in names], dtype)
    for name in packed:
        del weights[name]


def _copy(weights: Mapping[str, Tensor | PackedWeight], targets: Mapping[str, Tensor]) -> None:
    """Fills plain parameters and buffers."""
    for name, weight in weights.items():
        if isinstance(weight, PackedWeight):
            fill(name, targets[name], weight)
        else:
            with torch.no_grad():
                targets[name].copy_(weight)


def _manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).exists() and (folder / PROGRESS).exists():
        raise CheckpointError(
            f"{folder} is not finished: give the command that began it once more, and it goes on"
        )
    return read_manifest(folder / MANIFEST)


def _check_list(path: Path, manifest: Manifest, contents: Contents) -> None:
    """The files and weights of conclave.json are those of the model."""
    names = manifest.files.keys()
    # Exactly these, so that no path of a stranger is ever opened.
    if missing := sorted(contents.files.keys() - names):
        raise CheckpointError(f"{path} does not list {', '.join(missing[:8])}: copy it again")
    if foreign := sorted(names - contents.files.keys() - {*COPIED}):
        raise CheckpointError(f"{path} lists {foreign[0]!r}, which is no part of such a checkpoint")
    contents.check_weights(manifest.weights, str(path))


def check_file(path: Path, record: FileRecord, told_by: str = MANIFEST) -> None:
    """CheckpointError, which names the file, unless it is as `told_by` says."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise CheckpointError(
                f"{path} has {size} bytes, not {record.bytes} as {told_by} says: copy it again"
            )
        if FileRecord.of(path) != record:
            raise CheckpointError(
                f"{path} is not what was written: its sha256 is not that of {told_by}; "
                "copy it again, or make it again"
            )
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): copy it again") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error})") from error


def _header(file: Any, name: str) -> tuple[tuple[int, ...], str]:
    header = file.get_slice(name)
    return tuple(header.get_shape()), header.get_dtype()


def _read_packed(
    path: Path, file: Any, name: str, record: WeightRecord, device: torch.device
) -> PackedWeight:
    """A weight whose headers have been checked, in memory of its own on `device`."""
    format = Format.parse(record.format)
    fields = tensor_shapes(format, record.rows, record.columns, record.experts)
    tensors: dict[str, Tensor] = {
        # A copy, because what is mapped from the file need not be aligned as kernels want it.
        field: file.get_tensor(f"{name}.{field}").to(device, copy=True)
        for field in fields
    }
    weight = from_tensors(format, record.rows, record.columns, tensors)
    try:
        validate(weight)
    except LayoutError as error:
        raise CheckpointError(f"{path}: {name}: {error}; compress again") from error
    return weight
