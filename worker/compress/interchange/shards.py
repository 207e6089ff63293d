"""The safetensors files of a Hugging Face checkpoint, written one after the other, and their index.

A shard is held in memory until it is full. There is an index even for a single shard: loaders that
take every safetensors file of a folder go by it, and leave the maps alone. What it gave up: names
that tell the number of shards, which is not known before the last.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import replace_file
from ..manifest import FileRecord

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


class ShardWriter:
    """Tensors into shards of at most `limit` bytes; a larger tensor has one of its own."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = limit
        self._held: dict[str, Tensor] = {}
        self._places: dict[str, str] = {}
        self._bytes = self._total = 0
        self._files: dict[str, FileRecord] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor, which is kept as it is until its shard is written."""
        if self._held and self._bytes + tensor.nbytes > self._limit:
            self._write()
        # Of its own, since parts of a fused weight share their memory, which files cannot.
        self._held[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._bytes += tensor.nbytes

    def finish(self) -> dict[str, FileRecord]:
        """Write what is held, and the index; returns all files."""
        self._write()
        index = {"metadata": {"total_size": self._total}, "weight_map": self._places}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        record = replace_file(self._folder / INDEX, lambda path: path.write_text(text))
        return {**self._files, INDEX: record}

    def _write(self) -> None:
        file = f"model-{len(self._files) + 1:05d}.safetensors"
        held = self._held
        self._files[file] = replace_file(
            self._folder / file, lambda path: save_file(held, path, metadata={"format": "pt"})
        )
        self._places |= dict.fromkeys(held, file)
        self._total += self._bytes
        self._held, self._bytes = {}, 0
