"""Which tensors the files of a compressed checkpoint hold: told by config.json and the formats.

A file for each decoder layer and one for the rest; names are the decoder's own. A packed weight is
stored as NAME.codes, NAME.positions and NAME.scales, with rows of gate and up alternating; a plain
one as NAME, in any floating dtype, with the rows of gate before those of up.
"""

from collections.abc import Mapping

import torch

from ...kernels.errors import LayoutError
from ...kernels.formats import Format, tensor_shapes
from ..errors import CheckpointError
from ..model.config import ModelConfig
from ..model.packed import packable, tables
from ..weights import DTYPES, blank_decoder
from .manifest import REST, WeightRecord

STORED_AS = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""What safetensors calls the dtypes that may occur."""

Header = tuple[tuple[int, ...], str]
"""Shape and stored dtype of a tensor."""
Wanted = tuple[tuple[int, ...], tuple[str, ...]]
"""Shape, and the stored dtypes that will do."""


class Contents:
    """The files, weights and tensors of any compressed checkpoint of one model."""

    def __init__(self, config: ModelConfig) -> None:
        decoder = blank_decoder(config)
        self.layers = len(config.layers)
        self.shapes = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
        """Of every weight, as if plain."""
        self.packable = packable(decoder) | tables(decoder)
        """Module -> its weights, which are packed together or not at all."""
        self.packable_names = {name for names in self.packable.values() for name in names}
        """All weights that may be packed."""
        self.parts = {layer_file(index): f"layers.{index}" for index in range(self.layers)}
        self.parts[REST] = ""
        """File -> the module of the decoder that it fills; the rest comes last."""
        self.files: dict[str, list[str]] = {file: [] for file in self.parts}
        """File -> the weights in it."""
        for name in self.shapes:
            self.files[file_of(name)].append(name)

    def check_weights(self, weights: Mapping[str, WeightRecord], where: str) -> None:
        """CheckpointError unless the model has such weights and they can be packed that way."""
        for names in self.packable.values():
            if 0 < (count := sum(name in weights for name in names)) < len(names):
                packed, plain = sorted(names, key=lambda name: name not in weights)
                raise CheckpointError(
                    f"{where}: {packed} is packed but {plain} is not: "
                    f"pack both or neither ({count} of {len(names)})"
                )
        for name, record in weights.items():
            if name not in self.packable_names:
                raise CheckpointError(f"{where}: {name!r} is no weight that can be packed")
            if record.shape != self.shapes[name]:
                raise CheckpointError(
                    f"{where}: {name} is packed as {list(record.shape)}, but config.json makes it "
                    f"{list(self.shapes[name])}: both must be from the same checkpoint"
                )
            try:
                self._packed(name, record)
            except LayoutError as error:
                raise CheckpointError(f"{where}: {name}: {error}") from error

    def tensors(self, file: str, weights: Mapping[str, WeightRecord]) -> dict[str, Wanted]:
        """The tensors that `file` must hold, by name; `weights` have been checked."""
        wanted: dict[str, Wanted] = {}
        for name in self.files[file]:
            if name in weights:
                wanted |= self._packed(name, weights[name])
            else:
                wanted[name] = (self.shapes[name], DTYPES)
        return wanted

    @staticmethod
    def _packed(name: str, record: WeightRecord) -> dict[str, Wanted]:
        format = Format.parse(record.format)
        shapes = tensor_shapes(format, record.rows, record.columns, record.experts)
        return {
            f"{name}.{field}": (shape, (STORED_AS[dtype],))
            for field, (shape, dtype) in shapes.items()
        }


def layer_file(index: int) -> str:
    """The name of a layer's file."""
    return f"layer-{index:03d}.safetensors"


def file_of(name: str) -> str:
    """The name of the file that holds a weight."""
    part, _, rest = name.partition(".")
    return layer_file(int(rest.partition(".")[0])) if part == "layers" else REST


def check_tensors(where: str, found: Mapping[str, Header], wanted: Mapping[str, Wanted]) -> None:
    """CheckpointError, which names up to eight tensors at fault, unless `found` is as `wanted`."""
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name!r} is unexpected" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        (shape, dtype), (right, dtypes) = found[name], wanted[name]
        if shape != right or dtype not in dtypes:
            faults.append(
                f"{name} is {dtype} {list(shape)}, expected {' or '.join(dtypes)} {list(right)}"
            )
    if faults:
        raise CheckpointError(
            f"{where} does not fit config.json and conclave.json: {'; '.join(sorted(faults)[:8])}"
            f"{'; ...' if len(faults) > 8 else ''}. All must be from the same checkpoint"
        )
