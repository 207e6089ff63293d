"""The tensors of a Hugging Face checkpoint whose linear layers may be pack-quantized.

Every header is compared with config.json before a value is read, and all faults are told at once.
A linear layer is one plain tensor NAME, or NAME_packed, NAME_scale and NAME_shape; which of the
config's schemes it has follows from their shapes.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ...errors import CheckpointError
from ...model.config import ModelConfig
from ...weights import DTYPES, dead_tensors, open_files, tensor_map
from .coded import Coded, checked_scales
from .names import bare_name
from .schemes import Scheme
from .words import of_words

_QUANTIZED = re.compile(r"(.+\.weight)_(packed|scale|shape|zero_point|g_idx)")
_PLAIN = ""
"""The field of a tensor that is not quantized."""
_REFUSED = {"zero_point": "asymmetric", "g_idx": "grouped in order of activations"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies."""

    file: Any
    stored: str

    def header(self) -> tuple[tuple[int, ...], str]:
        own = self.file.get_slice(self.stored)
        return tuple(own.get_shape()), own.get_dtype()

    def read(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.stored)
        return tensor


class SourceReader:
    """The checkpoint in `folder`, mapped and checked; close it, or use it in a `with`.

    `schemes` are those of its config.json. Raises CheckpointError, which names what is missing,
    unexpected, wrong in shape or dtype, or quantized in a way that cannot be taken over.
    """

    def __init__(self, folder: Path, config: ModelConfig, schemes: frozenset[Scheme]) -> None:
        self.shapes = {name: target.shape for name, target in tensor_map(config).items()}
        """Of every tensor by bare name, as if plain."""
        self._places: dict[str, dict[str, _Place]] = {name: {} for name in self.shapes}
        self._schemes: dict[str, Scheme] = {}
        with ExitStack() as stack:
            unexpected = self._list(open_files(folder, stack), config)
            self._check(folder, unexpected, schemes)
            self._files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self, name: str) -> Coded | Tensor:
        """A tensor by bare name: a new `Coded` or, where it is mapped, a plain one.

        CheckpointError if the scales are not such as can be taken over exactly.
        """
        fields = self._places[name]
        if _PLAIN in fields:
            return fields[_PLAIN].read()
        bits = self._schemes[name].bits
        codes = of_words(fields["packed"].read(), bits)
        return Coded(codes, checked_scales(fields["scale"].read(), name), bits)

    def _list(self, files: list[Any], config: ModelConfig) -> list[str]:
        """Fills `_places`; returns the names of tensors that are none of the model's."""
        ignored = dead_tensors(config) | ({"lm_head.weight"} if config.tied_head else set())
        unexpected = []
        for file in files:
            for stored in file.keys():
                bare = bare_name(stored)
                match = None if bare is None else _QUANTIZED.fullmatch(bare)
                name, field = match.groups() if match else (bare, _PLAIN)
                if name is None or name in ignored:
                    continue
                if name not in self._places:
                    unexpected.append(stored)
                elif field in self._places[name]:
                    raise CheckpointError(f"{stored} is there twice: keep one of them")
                else:
                    self._places[name][field] = _Place(file, stored)
        return unexpected

    def _check(self, folder: Path, unexpected: list[str], schemes: frozenset[Scheme]) -> None:
        faults = [f"{name!r} is unexpected" for name in unexpected]
        for name, fields in self._places.items():
            for field in fields.keys() & _REFUSED.keys():
                raise CheckpointError(
                    f"{folder}: {name} is {_REFUSED[field]}, which our formats are not: take the "
                    "unquantized checkpoint and `conclave compress` it"
                )
            if fields.keys() == {_PLAIN}:
                fault = _fault_of_plain(fields[_PLAIN], self.shapes[name])
            elif fields.keys() == {"packed", "scale", "shape"}:
                fault = self._fault_of_quantized(name, fields, schemes)
            else:
                fault = f"has {sorted(fields)} alone" if fields else "is missing"
            if fault is not None:
                faults.append(f"{name} {fault}")
        if faults:
            raise CheckpointError(
                f"{folder}: the tensors do not fit config.json: {'; '.join(faults[:8])}"
                f"{'; ...' if len(faults) > 8 else ''}. Take both from the same Gemma 4 checkpoint"
            )

    def _fault_of_quantized(
        self, name: str, fields: Mapping[str, _Place], schemes: frozenset[Scheme]
    ) -> str | None:
        """What is wrong with such a tensor; if nothing is, its scheme goes into `_schemes`."""
        shape = self.shapes[name]
        headers = {field: place.header() for field, place in fields.items()}
        for scheme in schemes:
            if len(shape) != 2 or shape[1] % scheme.group:
                continue
            words = ((shape[0], shape[1] * scheme.bits // 32), "I32")
            scales = (shape[0], shape[1] // scheme.group)
            if headers["packed"] == words and headers["scale"][0] == scales:
                self._schemes[name] = scheme
        if name not in self._schemes:
            shapes = {field: list(header[0]) for field, header in headers.items()}
            return f"is {shapes}, which is {list(shape)} in no scheme of quantization_config"
        if headers["scale"][1] not in DTYPES:
            return f"has scales of {headers['scale'][1]}"
        if headers["shape"] not in (((2,), "I64"), ((2,), "I32")):
            return f"has a shape of {headers['shape'][1]} {list(headers['shape'][0])}"
        told = fields["shape"].read().tolist()
        return None if (*told,) == shape else f"says that it is {told}, not {list(shape)}"


def _fault_of_plain(place: _Place, shape: tuple[int, ...]) -> str | None:
    found, dtype = place.header()
    if found == shape and dtype in DTYPES:
        return None
    return f"is {dtype} {list(found)}, expected {list(shape)} of {', '.join(DTYPES)}"
