"""A thousand damaged checkpoints: refused with a typed error, or nothing is lost."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker.compress.interchange.importer import import_checkpoint
from conclave.worker.compress.interchange.seal import SEAL
from conclave.worker.compress.interchange.settings import ORIGINAL
from conclave.worker.errors import ConclaveError

from .conftest import Compressed, Exported, content

ODD: list[Any] = [
    *(None, True, 0, 1, -1, 2, 32, 10**30, 1.5, float("nan"), "", "x", "../x", "\ud800", "\0"),
    *([], {}, [[]], {"a": 1}, "pack-quantized", "model-00001.safetensors", "0" * 64),
]
Spoil = Callable[[Path, random.Random], None]


def flip(path: Path, draw: random.Random) -> None:
    """A bit anywhere."""
    _flip_within(path, draw, path.stat().st_size)


def flip_in_header(path: Path, draw: random.Random) -> None:
    """A bit in what a safetensors file tells of its tensors, or of its header's length."""
    size = int.from_bytes(path.read_bytes()[:8], "little") + 8
    _flip_within(path, draw, size)


def _flip_within(path: Path, draw: random.Random, size: int) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(size)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 9)))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def a_folder_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def another_file(path: Path, draw: random.Random) -> None:
    shutil.copy(draw.choice(sorted(set(path.parent.iterdir()) - {path})), path)


def nest(path: Path, draw: random.Random) -> None:
    path.write_text("[" * draw.choice([10, 10**5]))


def edit_json(path: Path, draw: random.Random) -> None:
    """Another value, another key or none, anywhere."""
    values = json.loads(path.read_text())
    place, key = values, draw.choice(list(values))
    while isinstance(place[key], dict) and place[key] and draw.random() < 0.9:
        place = place[key]
        key = draw.choice(list(place))
    old = place.pop(key)
    kind = draw.randrange(3)
    if kind == 0:
        place[key] = draw.choice(ODD)
    elif kind == 1:
        place[str(draw.choice(ODD))] = old
    path.write_text(json.dumps(values))


def edit_header(path: Path, draw: random.Random) -> None:
    """Another dtype, shape, name or place of a tensor; the header stays well formed."""
    data = path.read_bytes()
    end = int.from_bytes(data[:8], "little") + 8
    header = json.loads(data[8:end])
    name = draw.choice(list(header))
    old = header.pop(name)
    key = draw.choice(list(old))
    kind = draw.randrange(4)
    if kind == 0:
        header[name] = {**old, key: draw.choice([*ODD, "F32", "U8", "BF16", [1], [2**62, 4]])}
    elif kind == 1:
        header[draw.choice(list(header)) + draw.choice(["", "x", "_scale", "_g_idx"])] = old
    elif kind == 2 and "shape" in old:
        header[name] = {**old, "shape": old["shape"][::-1]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


ANY: list[Spoil] = [flip, flip, truncate, lengthen, remove, a_folder_instead, another_file]
TEXTS: list[Spoil] = [edit_json, edit_json, edit_json, nest, flip]
TENSORS: list[Spoil] = [flip_in_header, flip_in_header, edit_header, edit_header, truncate]


def spoil(folder: Path, draw: random.Random, sealed: bool) -> str:
    """Damages one file of a folder, and says which and how."""
    names = sorted(path.name for path in folder.iterdir())
    if not sealed:
        (folder / SEAL).unlink()
        names = [name for name in names if name not in (SEAL, ORIGINAL, "generation_config.json")]
    path = folder / draw.choice(names)
    own = TEXTS if path.suffix == ".json" else TENSORS
    # Without checksums a flipped bit among the weights is another weight, which is no news.
    how = draw.choice(ANY + own if sealed else own)
    how(path, draw)
    return f"{how.__name__} of {path.name}"


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        if path.is_dir():
            path.rmdir()
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


@pytest.mark.timeout(120)
def test_a_thousand_corruptions(
    exported: Exported, compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """800 exports of ours, whose checksums tell, and 200 of others, which have none."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    torch.set_num_threads(1)  # of which more cost tiny weights more than they bring
    source, expected = exported("11", "pack-quantized"), content(compressed("11"))
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    folder, refused = tmp_path / "source", 0
    folder.mkdir()
    for seed in range(1000):
        restore(folder, files)
        draw, sealed, target = random.Random(seed), seed < 800, tmp_path / str(seed)
        what = spoil(folder, draw, sealed)
        try:
            import_checkpoint(folder, target)
        except ConclaveError as error:
            refused += 1
            assert str(error), f"seed {seed}: {what}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {what}: {error!r}")
        else:
            assert not sealed or content(target) == expected, f"seed {seed}: {what}"
        shutil.rmtree(target, ignore_errors=True)
    assert refused > 850
