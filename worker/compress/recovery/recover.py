"""From a compressed checkpoint and its original to the same, recovered."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....kernels.formats import PackedWeight
from ...errors import CheckpointError, ConfigError
from ...model.config import ModelConfig
from ...weights import load_decoder
from ..checkpoint import CheckpointWriter
from ..fingerprint import fingerprint
from ..reader import load_compressed, read_list, read_weights
from .schedule import Schedule
from .training import Look, Recovery, Told


def recover_checkpoint(
    compressed: Path,
    original: Path,
    target: Path,
    tokens: Tensor,
    held_out: Tensor,
    schedule: Schedule,
    device: torch.device,
    told: Told = lambda step, done, look: None,
    teachers: Sequence[Path] = (),
    until: float = math.inf,
    written: int = 0,
) -> list[Look]:
    """Train what `compressed` keeps of `original` and write it to `target`; or go on with that.

    `tokens` and `held_out` are int64 [sequences, length]; the last `written` of the former are the
    teachers' own (`synthetic`). Formats and files are those of
    `compressed`, and so are maps unless the schedule learns them. `teachers` are full checkpoints
    of any shape with the same tokens, which teach together with the original. Training ends by
    `until`, of `time.monotonic()`. Beside `target` lies TARGET.training while it runs. Raises
    CheckpointError, and ConfigError for settings, text or teachers that will not do.
    """
    config = ModelConfig.load(compressed)
    if ModelConfig.load(original) != config:
        raise CheckpointError(f"{compressed} and {original} are not of the same model")
    manifest, contents = read_list(compressed, config)
    for other in teachers:
        _check_words(original, other)
    key = _key((compressed, original, *teachers), tokens, held_out, written)
    student = load_compressed(compressed, config, device, torch.float32, packed=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher, *others = (
        load_decoder(folder, ModelConfig.load(folder), device, dtype).requires_grad_(False)
        for folder in (original, *teachers)
    )
    stored: dict[str, Tensor | PackedWeight] = {}
    for file in contents.files:
        path = compressed / file
        stored |= read_weights(path, manifest.files[file], contents, manifest.weights, device)
    packed = {name: own for name, own in stored.items() if isinstance(own, PackedWeight)}
    plain = {name: own.dtype for name, own in stored.items() if isinstance(own, Tensor)}
    state = target.with_name(target.name + ".training")
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = CheckpointWriter(target, compressed, key)
    run = Recovery(student, packed, teacher, schedule, state, key, others=others)
    run.run(tokens, held_out, told, until, written)
    found = dict[str, Tensor | PackedWeight](run.packed())
    trained = run.plain()
    found |= {name: trained[name].detach().to(dtype) for name, dtype in plain.items()}
    for index in range(contents.layers):
        prefix = f"layers.{index}."
        writer.write_layer(index, {n: own for n, own in found.items() if n.startswith(prefix)})
    writer.write_rest({n: own for n, own in found.items() if not n.startswith("layers.")})
    account = _account(schedule, tokens, run) | {"written": written}
    account["teachers"] = [folder.name for folder in (original, *teachers)]
    writer.finish({**manifest.about, "recovery": account})
    return run.looks


def _check_words(original: Path, other: Path) -> None:
    """Refuse a teacher whose token ids mean something else."""
    sizes = [ModelConfig.load(folder).vocab_size for folder in (original, other)]
    files = [folder / "tokenizer.json" for folder in (original, other)]
    there = all(file.exists() for file in files)
    if sizes[0] != sizes[1] or (there and files[0].read_bytes() != files[1].read_bytes()):
        raise ConfigError(
            f"{other} cannot teach beside {original}: its tokens are others; give teachers with "
            "the same tokenizer.json"
        )


def _key(folders: Sequence[Path], tokens: Tensor, held_out: Tensor, written: int) -> str:
    """What must be the same to go on with a run."""
    digest = sha256("".join([*map(fingerprint, folders), str(written)]).encode())
    for own in (tokens, held_out):
        digest.update(own.numpy().tobytes())
    return digest.hexdigest()


def _account(schedule: Schedule, tokens: Tensor, run: Recovery) -> dict[str, Any]:
    """For people."""
    return {
        "schedule": asdict(schedule),
        "sequences": list(tokens.shape),
        "looks": [asdict(look) for look in run.looks],
        "best": asdict(run.best) if run.best else None,
    }
