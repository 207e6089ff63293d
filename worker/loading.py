"""From settings to a model that can run: device, weights, tokenizer, and a cache that fits."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from ..kernels.errors import LayoutError
from ..kernels.layouts import Format
from .compress.manifest import MANIFEST, read_manifest
from .compress.reader import check_settings, is_compressed, load_compressed
from .config import EngineConfig
from .errors import CheckpointError, ConfigError
from .model.config import ModelConfig, cache_groups
from .model.decoder import Decoder
from .model.packed import pack_decoder, round_decoder
from .running.runner import ModelRunner
from .scheduling.sizing import CachePlan, plan_cache
from .text.tokenizer import Tokenizer
from .weights import blank_decoder, load_decoder

Progress = Callable[[int, int], None]
"""Called with tensors loaded so far and in all."""

_GPU_SHARE = 0.9
"""Of the GPU memory free after loading; the rest is for activations."""
_CPU_SHARE, _CPU_LIMIT = 0.25, 2**30
"""Of the free host memory, and at most: other programs live there too."""

_SAMPLES, _SAMPLE_BYTES = 64, 65536
"""Places and bytes read of each weight file for the fingerprint."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint on its device, ready to run."""

    config: ModelConfig
    runner: ModelRunner
    tokenizer: Tokenizer
    cache: CachePlan
    windows: tuple[int | None, ...]
    """Sliding window of each cache group."""
    device: torch.device
    dtype: torch.dtype
    parameters: int
    fingerprint: str
    """Equal weights, equal value."""

    @property
    def vocabulary(self) -> int:
        """Token ids that may go in and come out: every table must have a row for them."""
        sizes = [self.config.vocab_size]
        if self.config.per_layer_input_size:
            sizes.append(self.config.per_layer_vocab_size)
        return min(sizes)


def load_model(config: EngineConfig, progress: Progress | None = None) -> LoadedModel:
    """Load a checkpoint as the settings say.

    Raises:
        CheckpointError: the folder does not hold a Gemma 4 checkpoint that can be run.
        ConfigError: the device is not there, the cache does not fit, or a compressed checkpoint
            would be packed again.
    """
    folder = config.model
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the path of a checkpoint")
    format = _weight_format(config.weight_format)
    if is_compressed(folder):
        if format is not None:
            raise ConfigError(
                f"weight_format is {format}, but {folder} is compressed already: leave it out"
            )
        check_settings(folder)
    device = device_of(config.device)
    dtype = _dtype(config.dtype, device)
    torch.set_num_threads(config.threads or _spare_threads())
    model = ModelConfig.load(folder)
    tokenizer = Tokenizer(folder)
    if tokenizer.vocabulary_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocabulary_size} tokens, the model only "
            f"{model.vocab_size}: they do not belong together"
        )
    decoder = _decoder(folder, model, device, dtype, format, progress)
    groups = cache_groups(model)
    plan = plan_cache(
        config, groups, model.max_position_embeddings, dtype.itemsize, _free_memory(device)
    )
    runner = ModelRunner(decoder, model, plan.blocks, config.block_size, device, dtype)
    return LoadedModel(
        config=model,
        runner=runner,
        tokenizer=tokenizer,
        cache=plan,
        windows=tuple(group.window for group in groups),
        device=device,
        dtype=dtype,
        parameters=sum(parameter.numel() for parameter in blank_decoder(model).parameters()),
        fingerprint=fingerprint(folder) + (f" {format}" if format else ""),
    )


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


def _decoder(
    folder: Path,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    format: Format | None,
    progress: Progress | None,
) -> Decoder:
    """The decoder of either kind of checkpoint, packed into `format` if there is one."""
    if is_compressed(folder):
        return load_compressed(folder, model, device, dtype, progress)
    decoder = load_decoder(folder, model, device, dtype, progress)
    if format is not None and device.type == "cpu":
        round_decoder(decoder, format)
    elif format is not None:
        pack_decoder(decoder, format)
        torch.cuda.empty_cache()
    return decoder


def _canonical_json(path: Path) -> bytes:
    return json.dumps(json.loads(path.read_text()), sort_keys=True).encode()


def _spare_threads() -> int:
    """Torch's own choice, but one core less than there are: gRPC and the scheduler need one.

    Threads that wait for each other at every small product suffer most when a core is taken from
    them: two threads on two busy cores made a step of the 8M model five times as long as one.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min(torch.get_num_threads(), cores - 1))


def device_of(name: str) -> torch.device:
    """What `EngineConfig.device` names; ConfigError if that cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _weight_format(text: str | None) -> Format | None:
    try:
        return None if text is None else Format.parse(text)
    except LayoutError as error:
        raise ConfigError(f"weight_format: {error}") from error


def _free_memory(device: torch.device) -> int:
    """Bytes that the KV cache may take by default."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(pages * _CPU_SHARE), _CPU_LIMIT)
