"""A LoRA adapter as PEFT saves it, merged into a checkpoint's weights while they are read.

W + scale * B A, tensor by tensor, in float32: neither the merged checkpoint nor the products ever
lie anywhere as a whole. Modules that were trained in full (`modules_to_save`) take the place of
their originals. Whatever else is in the file is refused by name, but for parts that a text model
has not (image and audio towers, dead keys), which are counted. What it gave up: experts
(`target_parameters`), whose tensors do not tell which of the two weights they belong to.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import CheckpointError
from ...model.config import ModelConfig
from ...weights import DTYPES, FOREIGN, PREFIXES, Target, dead_tensors, tensor_map
from .settings import SETTINGS, AdapterSettings, read_settings

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
    ".base_layer.weight": "full",
}
"""What a tensor is by the end of its name; others are whole tensors of the model."""
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of the adapter: of which module, and what of it."""

    stored: str
    module: str
    kind: str


class Adapter:
    """An adapter that fits a model; raises CheckpointError, which names what does not.

    Its file is opened again for each tensor: the headers are small, and nothing is to be closed.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._path = folder / WEIGHTS
        self._settings = read_settings(folder)
        self._parts: dict[str, dict[str, _Part]] = {}
        self.unused: list[str] = []
        """Its tensors for what a text model has not."""
        table = tensor_map(config)
        table.setdefault(_HEAD, table[_EMBEDDING])  # an adapter can have both of a tied pair
        with _open(self._path) as file:
            self._sort(list(file.keys()), table, dead_tensors(config))
            _check(self._path, file, self._parts, table, self._settings)
            if config.tied_head:
                _check_tied(self._path, file, self._parts, self._settings)
        self._parts.pop(_HEAD if config.tied_head else "", None)
        self.fingerprint = _digest(folder)

    def change(self, name: str, tensor: Tensor) -> Tensor:
        """The checkpoint's `tensor`, by its name without prefix, with the adapter in it."""
        parts = self._parts.get(name)
        if parts is None:
            return tensor
        with _open(self._path) as file:
            found = {kind: file.get_tensor(part.stored) for kind, part in parts.items()}
        merged: Tensor = found.pop("full", tensor).float()
        if found:
            module = next(part.module for kind, part in parts.items() if kind in found)
            low, high = (own.float() for _, own in sorted(found.items()))
            product = (high @ low).T if "embedding A" in found else high @ low
            merged = merged + self._settings.scale(module) * product
        return merged

    def about(self) -> dict[str, object]:
        """What conclave.json says of it."""
        return {"fingerprint": self.fingerprint, "unused_tensors": len(self.unused)}

    def _sort(self, names: list[str], table: Mapping[str, Target], dead: set[str]) -> None:
        """Finds out what each tensor is for."""
        unknown = []
        for stored in sorted(names):
            own = stored.removeprefix(_PREFIX)
            end = next((end for end in _PARTS if own.endswith(end)), "")
            module = own.removesuffix(end) if end else own.removesuffix(".weight")
            full = f"{module}.weight" if end else own
            name = full.removeprefix(next(each for each in PREFIXES if full.startswith(each)))
            if own != stored and (FOREIGN.match(full) or name in dead):
                self.unused.append(stored)
            elif own == stored or name not in table:
                unknown.append(f"{stored!r} is for no weight of the model")
            else:
                kinds = self._parts.setdefault(name, {})
                part = _Part(stored, module, _PARTS.get(end, "full"))
                if kinds.setdefault(part.kind, part) != part:
                    unknown.append(f"{stored} and {kinds[part.kind].stored} are the same")
        _refuse(self._path, unknown)
        if not self._parts:
            raise CheckpointError(f"{self._path} has nothing that changes the model")


def _check(
    path: Path,
    file: Any,
    found: Mapping[str, Mapping[str, _Part]],
    table: Mapping[str, Target],
    settings: AdapterSettings,
) -> None:
    """All shapes and dtypes are right, and no A is without its B."""
    faults = []
    for name, parts in found.items():
        shape = table[name].shape
        for kind, part in parts.items():
            wanted = {"full": shape}
            if len(shape) == 2:
                rank, (rows, columns) = settings.rank(part.module), shape
                if name.startswith("embed_tokens"):
                    wanted |= {"embedding A": (rank, rows), "embedding B": (columns, rank)}
                else:
                    wanted |= {"A": (rank, columns), "B": (rows, rank)}
            header = file.get_slice(part.stored)
            own, dtype = tuple(header.get_shape()), header.get_dtype()
            other = kind[:-1] + ("B" if kind.endswith("A") else "A")
            if kind not in wanted:
                faults.append(f"{part.stored}: a {name} has no such part")
            elif own != wanted[kind] or dtype not in DTYPES:
                faults.append(f"{part.stored} is {dtype} {list(own)}, expected {[*wanted[kind]]}")
            elif kind != "full" and other not in parts:
                faults.append(f"{part.stored} is there without its {other[-1]}")
    _refuse(path, faults)


def _check_tied(
    path: Path, file: Any, found: Mapping[str, Mapping[str, _Part]], settings: AdapterSettings
) -> None:
    """Embedding and head, which are one in this model, were trained as one."""
    changed = {name: found[name] for name in (_EMBEDDING, _HEAD) if name in found}
    if not changed:
        return
    whole = [parts["full"].stored for parts in changed.values() if parts.keys() == {"full"}]
    tied = _EMBEDDING in changed and len(whole) == len(changed)
    if tied and len(whole) == 2:
        tied = torch.equal(*(file.get_tensor(stored) for stored in whole))
    elif tied:
        tied = settings.ensure_weight_tying
    if not tied:
        stored = ", ".join(part.stored for parts in changed.values() for part in parts.values())
        raise CheckpointError(
            f"{path} changes {stored}, but the model's head is its embedding: train both in full "
            "and as one (modules_to_save with ensure_weight_tying), or neither"
        )


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        raise CheckpointError(
            f"{path} does not fit the model and {SETTINGS}: {'; '.join(faults[:8])}"
            f"{'; ...' if len(faults) > 8 else ''}. Name the checkpoint that it was trained on"
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: save the adapter as safetensors") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error})") from error


def _digest(folder: Path) -> str:
    """SHA-256 of all of it."""
    digest = hashlib.sha256()
    for name in (SETTINGS, WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
