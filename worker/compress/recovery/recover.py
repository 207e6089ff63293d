"""From a compressed checkpoint and its original to the same, recovered."""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....kernels.formats import PackedWeight
from ...errors import CheckpointError
from ...loading import fingerprint
from ...model.config import ModelConfig
from ...weights import load_decoder
from ..checkpoint import CheckpointWriter
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
    told: Told = lambda step, look: None,
) -> list[Look]:
    """Train what `compressed` keeps of `original` and write it to `target`; or go on with that.

    `tokens` and `held_out` are int64 [sequences, length]. Maps, formats and files are those of
    `compressed`. Beside `target` lies TARGET.training while it runs. Raises CheckpointError, and
    ConfigError for settings or text that will not do.
    """
    config = ModelConfig.load(compressed)
    if ModelConfig.load(original) != config:
        raise CheckpointError(f"{compressed} and {original} are not of the same model")
    manifest, contents = read_list(compressed, config)
    key = _key(compressed, original, tokens, held_out)
    student = load_compressed(compressed, config, device, torch.float32, packed=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = load_decoder(original, config, device, dtype).requires_grad_(False)
    stored: dict[str, Tensor | PackedWeight] = {}
    for file in contents.files:
        path = compressed / file
        stored |= read_weights(path, manifest.files[file], contents, manifest.weights, device)
    packed = {name: own for name, own in stored.items() if isinstance(own, PackedWeight)}
    plain = {name: own.dtype for name, own in stored.items() if isinstance(own, Tensor)}
    state = target.with_name(target.name + ".training")
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = CheckpointWriter(target, compressed, key)
    run = Recovery(student, packed, teacher, schedule, state, key)
    run.run(tokens, held_out, told)
    found = dict[str, Tensor | PackedWeight](run.packed())
    trained = run.plain()
    found |= {name: trained[name].detach().to(dtype) for name, dtype in plain.items()}
    for index in range(contents.layers):
        prefix = f"layers.{index}."
        writer.write_layer(index, {n: own for n, own in found.items() if n.startswith(prefix)})
    writer.write_rest({n: own for n, own in found.items() if not n.startswith("layers.")})
    writer.finish({**manifest.about, "recovery": _account(schedule, tokens, run)})
    return run.looks


def _key(compressed: Path, original: Path, tokens: Tensor, held_out: Tensor) -> str:
    """What must be the same to go on with a run."""
    digest = sha256((fingerprint(compressed) + fingerprint(original)).encode())
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
