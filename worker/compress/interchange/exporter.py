"""A compressed checkpoint as a Hugging Face folder, one of its files after the other.

`pack-quantized`: linear layers of integers keep their codes and scales, pruned weights at the zero
code; `dense`: every weight is written out. Either has the maps beside it. What it gave up: experts,
embeddings and heads are plain values in both, since stock loaders do not read them otherwise; like
everything that is written out they are rounded to the checkpoint's own dtype, unless float32 is
asked for, and the maps hold the scales that find their integers again.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ....kernels.formats import PackedWeight
from ....kernels.layouts import codes_of, mask_of, scales_of, unpack
from ...errors import ConfigError
from ...model.config import ModelConfig
from ...model.packed import plain_order
from ..checkpoint import replace_file
from ..manifest import COPIED, FileRecord
from ..reader import read_list, read_weights
from .maps import FILE, MapWriter
from .names import Part, parts_of
from .schemes import PACK_QUANTIZED, Scheme, written
from .seal import write_seal
from .settings import CONFIG, ORIGINAL, of_text, read_config, text_of
from .shards import SHARD_BYTES, ShardWriter
from .words import to_words

Style = Literal["pack-quantized", "dense"]
STYLES: tuple[Style, ...] = get_args(Style)
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Exported:
    """What became of one packed weight."""

    name: str
    format: str
    written_as: str


def export_checkpoint(
    source: Path,
    target: Path,
    style: Style,
    told: Callable[[int, int], None] = lambda done, files: None,
    exact: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[Exported]:
    """Export the compressed checkpoint in `source` to the new folder `target`.

    `told` hears of (files done, files in all). Integers that are written out as plain values become
    float32 if `exact`. A shard has at most `shard_bytes`, or a single tensor. Raises
    CheckpointError, as reading does, and ConfigError if `target` holds anything.
    """
    manifest, contents = read_list(source, config := ModelConfig.load(source))
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise ConfigError(f"{target} is not empty: remove it or name a new folder")
    run = _Export(config, style, ShardWriter(target, shard_bytes))
    for done, file in enumerate(contents.files, start=1):
        weights = read_weights(
            source / file, manifest.files[file], contents, manifest.weights, _CPU
        )
        dtype = torch.float32 if exact else _dtype_of(weights)
        for name, weight in weights.items():
            run.write(name, weight, dtype)
        told(done, len(contents.files))
    files = {**run.shards.finish(), FILE: run.maps.write(target)}
    for name in COPIED:
        if (source / name).is_file():
            place = target / (ORIGINAL if name == CONFIG else name)
            files[place.name] = replace_file(place, partial(shutil.copyfile, source / name))
    files[CONFIG] = _write_config(target, read_config(source / CONFIG), run)
    about: dict[str, Any] = {"format": style, "weights": [asdict(own) for own in run.outcomes]}
    write_seal(target, files, manifest.weights, about)
    return run.outcomes


class _Export:
    """What has been written so far."""

    def __init__(self, config: ModelConfig, style: Style, shards: ShardWriter) -> None:
        self._parts = parts_of(config)
        self._style = style
        self.shards = shards
        self.maps = MapWriter()
        self.layers: dict[str, Scheme] = {}
        """Quantized layers by module name."""
        self.plain: list[str] = []
        """Linear layers that are not."""
        self.outcomes: list[Exported] = []

    def write(self, name: str, weight: Tensor | PackedWeight, dtype: torch.dtype) -> None:
        """A weight of the decoder as its parts; `dtype` is for what must be written out."""
        parts = self._parts[name]
        if isinstance(weight, Tensor):
            for part in parts:
                self._write_plain(part, _rows(weight, part))
            return
        if not weight.format.dense:
            mask = plain_order(name, mask_of(weight))
            for part in parts:
                self.maps.add(part.stored, _rows(mask, part))
        if not weight.format.group:
            how = self._write_values(name, weight, parts, torch.bfloat16)
        elif self._style == PACK_QUANTIZED and all(part.is_projection for part in parts):
            how = self._write_codes(name, weight, parts)
        else:
            how = self._write_values(name, weight, parts, dtype)
            scales = plain_order(name, scales_of(weight))
            for part in parts:
                own = _rows(scales, part).clone()
                self.maps.add_scales(part.stored, own, weight.format.bits)
        self.outcomes.append(Exported(name, str(weight.format), how))

    def _write_codes(self, name: str, weight: PackedWeight, parts: tuple[Part, ...]) -> str:
        format = weight.format
        codes = plain_order(name, codes_of(weight))
        scales = plain_order(name, scales_of(weight))
        for part in parts:
            tensors = {
                "packed": to_words(_rows(codes, part), format.bits),
                "scale": _rows(scales, part),
                "shape": torch.tensor(part.shape),
            }
            for field, tensor in tensors.items():
                self.shards.add(f"{part.stored}_{field}", tensor)
            self.layers[part.stored.removesuffix(".weight")] = Scheme(format.bits, format.group)
        return f"{PACK_QUANTIZED} int{format.bits}, group {format.group}"

    def _write_values(
        self, name: str, weight: PackedWeight, parts: tuple[Part, ...], dtype: torch.dtype
    ) -> str:
        values = plain_order(name, unpack(weight, dtype))
        for part in parts:
            self._write_plain(part, _rows(values, part))
        return f"plain {str(dtype).removeprefix('torch.')}"

    def _write_plain(self, part: Part, values: Tensor) -> None:
        self.shards.add(part.stored, values)
        if values.dim() == 2 and "embed" not in part.name:
            self.plain.append(part.stored.removesuffix(".weight"))


def _rows(tensor: Tensor, part: Part) -> Tensor:
    return tensor.narrow(0, part.start, part.shape[0])


def _dtype_of(weights: Mapping[str, Tensor | PackedWeight]) -> torch.dtype:
    """The checkpoint's own dtype, as far as one of its files tells: that of the norms."""
    norms = {own.dtype for own in weights.values() if isinstance(own, Tensor) and own.dim() == 1}
    return torch.bfloat16 if norms == {torch.bfloat16} else torch.float32


def _write_config(target: Path, values: Mapping[str, Any], run: _Export) -> FileRecord:
    quantization = written(run.layers, run.plain) if run.layers else None
    text = text_of(of_text(values, quantization))
    return replace_file(target / CONFIG, lambda path: path.write_text(text))
