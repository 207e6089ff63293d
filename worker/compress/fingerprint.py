"""What tells two checkpoints apart, compressed ones or others, without reading all of them."""

import json
from hashlib import sha256
from pathlib import Path

from .manifest import MANIFEST, read_manifest
from .reader import is_compressed

_SAMPLES, _SAMPLE_BYTES = 64, 65536
"""Places and bytes read of each weight file for the fingerprint."""


def fingerprint(folder: Path) -> str:
    """SHA-256 of the configuration and of the weight files' names, sizes and samples.

    Reads 4 MiB a file, so it is cheap even for 60 GB: the headers, and places spread evenly over
    the weights. Other training changes weights everywhere and so is seen; a change of a few
    numbers may not be. A compressed checkpoint has the checksums of its files at hand.
    """
    digest = sha256(_canonical_json(folder / "config.json"))
    if is_compressed(folder):
        files = read_manifest(folder / MANIFEST).files
        for name in sorted(name for name in files if name.endswith(".safetensors")):
            digest.update(f"{name}:{files[name].sha256}".encode())
        return digest.hexdigest()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _canonical_json(path: Path) -> bytes:
    return json.dumps(json.loads(path.read_text()), sort_keys=True).encode()
