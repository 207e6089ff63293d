"""conclave-export.json: the checksums of an exported folder, written last, and checked on import.

A folder without one is somebody else's checkpoint, whose files have no checksums to hold them to.
Of the same form as conclave.json; `weights` tells what was exported, for people.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..checkpoint import replace_file
from ..manifest import VERSION, FileRecord, Manifest, WeightRecord, read_manifest
from ..reader import check_file

SEAL = "conclave-export.json"


def write_seal(
    folder: Path,
    files: Mapping[str, FileRecord],
    weights: Mapping[str, WeightRecord],
    about: Mapping[str, Any],
) -> None:
    """List `files`, which are all that belong to the folder."""
    seal = Manifest(version=VERSION, files={**files}, weights={**weights}, about={**about})
    replace_file(folder / SEAL, lambda path: path.write_text(seal.text()))


def check_seal(folder: Path) -> bool:
    """Whether there is a seal; CheckpointError, which names the file, if one is not as it says."""
    if not (folder / SEAL).exists():
        return False
    files = read_manifest(folder / SEAL).files
    for name, record in files.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise CheckpointError(f"{folder / SEAL} lists {name!r}, which is no name of a file")
        check_file(folder / name, record, SEAL)
    return True
