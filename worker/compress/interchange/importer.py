"""A Hugging Face checkpoint, pack-quantized or with maps, as a compressed one: nothing is rounded.

Codes and scales are taken over as they are. A weight whose parts have maps that keep the same N of
every 16 columns becomes N:16; without such maps it is dense. What does not fit one format (parts
that are quantized differently, or an MLP of which one weight alone could be packed) is written as
plain float32, which holds its values exactly; so are quantized layers that are never packed here.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from shutil import copyfile

import torch
from torch import Tensor

from ....kernels.errors import LayoutError
from ....kernels.formats import SPAN, Format, PackedWeight
from ....kernels.layouts import pack, pack_codes
from ...errors import CheckpointError
from ...model.config import ModelConfig
from ...model.fields import Fields
from ...model.packed import packed_order
from ..checkpoint import CheckpointWriter
from ..contents import Contents, layer_file
from ..manifest import COPIED, REST, FileRecord
from .coded import Coded, checked_scales
from .maps import FILE, Maps, kept_of
from .names import parts_of
from .schemes import read
from .seal import check_seal
from .settings import CONFIG, ORIGINAL, read_config, text_of, without_quantization
from .source import SourceReader

Piece = tuple[Coded | Tensor, Tensor | None]
"""A tensor of theirs, and its map."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one weight that can be packed."""

    name: str
    format: str


def import_checkpoint(
    source: Path,
    target: Path,
    maps: Path | None = None,
    told: Callable[[int, int], None] = lambda done, files: None,
) -> list[Imported]:
    """Import the checkpoint in `source` into `target`, or go on where that was left.

    `maps` is a file as of `maps`, by default sparsity.safetensors in the source if there is one.
    `told` hears of (files done, files in all). Raises CheckpointError for a source that is damaged
    or cannot be taken over exactly, and ConfigError if `target` holds something else.
    """
    sealed = check_seal(source)
    values = read_config(source / CONFIG)
    schemes = read(Fields(values))
    if values.get("text_config") is not None:
        schemes |= read(Fields(values).section("text_config"))
    config = ModelConfig.parse(plain := without_quantization(values))
    if sealed and (source / ORIGINAL).exists():
        plain = read_config(source / ORIGINAL)
        if ModelConfig.parse(plain) != config:
            raise CheckpointError(
                f"{source / ORIGINAL} is not of the same model as {CONFIG}: export it again"
            )
    if maps is None and (source / FILE).exists():
        maps = source / FILE
    with (
        SourceReader(source, config, schemes) as reader,
        Maps(maps, reader.shapes) as own_maps,
        tempfile.TemporaryDirectory() as folder,
    ):
        for name in COPIED:
            if (source / name).is_file():
                copyfile(source / name, Path(folder) / name)
        if sealed and (source / ORIGINAL).exists():
            copyfile(source / ORIGINAL, Path(folder) / CONFIG)
        else:
            (Path(folder) / CONFIG).write_text(text_of(plain))
        writer = CheckpointWriter(target, Path(folder), _key(source, maps))
        run = _Import(config, writer.contents, reader, own_maps)
        finished, layers = writer.finished_layers(), len(config.layers)
        for index in range(layers):
            if index in finished:
                run.note(layer_file(index), writer.read_layer(index))
            else:
                writer.write_layer(index, run.weights(layer_file(index)))
            told(index + 1, layers + 1)
        writer.write_rest(run.weights(REST))
        told(layers + 1, layers + 1)
        weights = [asdict(outcome) for outcome in run.outcomes]
        writer.finish({"imported": str(source), "weights": weights})
    return run.outcomes


class _Import:
    """What has been read so far."""

    def __init__(
        self, config: ModelConfig, contents: Contents, reader: SourceReader, maps: Maps
    ) -> None:
        self._parts = parts_of(config)
        self._contents = contents
        self._reader = reader
        self._maps = maps
        self.outcomes: list[Imported] = []

    def weights(self, file: str) -> dict[str, Tensor | PackedWeight]:
        """All weights of one file of a compressed checkpoint."""
        found: dict[str, Tensor | PackedWeight] = {}
        names = self._contents.files[file]
        for module in self._contents.packable.values():
            if module[0] not in names:
                continue
            packed = {}
            for name in module:
                own = _packed(name, self._pieces(name))
                if own is None:
                    break
                packed[name] = own
            else:
                found |= packed
        for name in names:
            if name not in found:
                found[name] = _plain([piece for piece, _ in self._pieces(name)])
        self.note(file, found)
        return {name: found[name] for name in names}

    def note(self, file: str, weights: dict[str, Tensor | PackedWeight]) -> None:
        """Keep in mind what became of the weights of a file."""
        for name in self._contents.files[file]:
            own = weights[name]
            if isinstance(own, PackedWeight):
                self.outcomes.append(Imported(name, str(own.format)))
            elif name in self._contents.packable_names:
                self.outcomes.append(Imported(name, f"plain {own.dtype}".replace("torch.", "")))

    def _pieces(self, name: str) -> list[Piece]:
        return [self._piece(part.name) for part in self._parts[name]]

    def _piece(self, name: str) -> Piece:
        """A tensor of theirs, checked against its map and with its integers if they are known."""
        own, mask = self._reader.read(name), self._maps.mask(name)
        if mask is not None:
            numbers = own.codes if isinstance(own, Coded) else own
            if bool((numbers.ne(0) & ~mask).any()):
                raise CheckpointError(
                    f"{name} has values where its map has none: take the maps that belong to the "
                    "checkpoint (--maps)"
                )
        scales = self._maps.scales(name)
        if isinstance(own, Tensor) and scales is not None:
            own = Coded.found_in(own, checked_scales(scales[0], name), scales[1], name)
        return own, mask


def _packed(name: str, pieces: list[Piece]) -> PackedWeight | None:
    """A weight of ours from its parts; None if no format holds them exactly."""
    masks = [mask for _, mask in pieces if mask is not None]
    kept = {kept_of(mask) for mask in masks}
    mask = packed_order(name, torch.cat(masks)) if len(masks) == len(pieces) else None
    number = kept.pop() if mask is not None and len(kept) == 1 else None
    try:
        coded = [own for own, _ in pieces if isinstance(own, Coded)]
        if len(coded) == len(pieces) and len({(own.bits, own.group) for own in coded}) == 1:
            codes = packed_order(name, torch.cat([own.codes for own in coded]))
            scales = packed_order(name, torch.cat([own.scales for own in coded]))
            format = Format(number or SPAN, coded[0].bits, coded[0].group)
            return pack_codes(codes, format, scales, None if format.dense else mask)
        plain = [own for own, _ in pieces if isinstance(own, Tensor)]
        if len(plain) < len(pieces) or mask is None or number in (None, 0, SPAN):
            return None
        values = packed_order(name, torch.cat(plain))
        if not torch.equal(values.bfloat16().to(values.dtype), values):
            return None
        return pack(values, Format(number, 16, 0), mask)
    except LayoutError as error:
        raise CheckpointError(f"{name} cannot be packed: {error}") from error


def _plain(pieces: list[Coded | Tensor]) -> Tensor:
    """A weight as plain as its parts are, else in float32."""
    dtypes = {own.dtype if isinstance(own, Tensor) else None for own in pieces}
    if len(dtypes) == 1 and None not in dtypes:
        return torch.cat([own for own in pieces if isinstance(own, Tensor)])
    return torch.cat([own.values() if isinstance(own, Coded) else own.float() for own in pieces])


def _key(source: Path, maps: Path | None) -> str:
    """What must be the same to go on: files of weights and maps, by their sizes and times."""
    files = sorted(source.glob("*.safetensors")) + ([] if maps is None else [maps])
    told = [(path.name, (own := path.stat()).st_size, own.st_mtime_ns) for path in files]
    return sha256(f"{told} {FileRecord.of(source / CONFIG)}".encode()).hexdigest()
