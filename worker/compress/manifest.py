"""conclave.json: what a compressed checkpoint says about its own files and weights.

    {"version": 1,
     "files": {"layer-000.safetensors": {"bytes": 1234, "sha256": "9f86..."}, ...},
     "weights": {"layers.0.attention.qkv.weight":
                 {"format": "5:16-int4-g64", "rows": 2048, "columns": 1536, "experts": null}, ...},
     "about": {...}}

`files` are all that belong to it, `weights` those that are packed, `about` is for people. The same
form, named progress.json, is the account of one that is still being made.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...kernels.layouts import PackedWeight
from ..errors import CheckpointError

MANIFEST, PROGRESS = "conclave.json", "progress.json"
REST = "rest.safetensors"
"""Everything outside the decoder's layers."""
COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("LICENSE", "NOTICE"),
)
"""What is taken over from the source as it is, if it is there; config.json must be."""
VERSION = 1


class FileRecord(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Reads the whole file; OSError if it cannot be."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(bytes=file.tell(), sha256=digest)


class WeightRecord(BaseModel):
    """How a weight [rows, columns], or a stack of `experts` such, is packed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str
    rows: int
    columns: int
    experts: int | None

    @classmethod
    def of(cls, weight: PackedWeight) -> "WeightRecord":
        return cls(
            format=str(weight.format),
            rows=weight.rows,
            columns=weight.columns,
            experts=weight.experts,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight before it was packed."""
        stack = () if self.experts is None else (self.experts,)
        return (*stack, self.rows, self.columns)


class Manifest(BaseModel):
    """See the module."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int
    files: dict[str, FileRecord]
    weights: dict[str, WeightRecord]
    about: dict[str, Any]

    def text(self) -> str:
        """As it is stored: the same bytes for the same content."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"


def read_manifest(path: Path) -> Manifest:
    """The content of `path`; CheckpointError if that is of another version or no manifest."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: name a compressed checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): copy it again") from error
    version = values.get("version") if isinstance(values, dict) else None
    if type(version) is int and version != VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, and this Conclave reads version {VERSION}: "
            "use the release that wrote it, or compress again"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise CheckpointError(f"{path}: {place}: {first['msg']}; copy it again") from error
