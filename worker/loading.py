"""From settings to a model that can run: device, weights, tokenizer, and a cache that fits."""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..kernels.errors import CodeError, LayoutError
from ..kernels.layouts import Format
from .compress.fingerprint import fingerprint
from .compress.reader import check_settings, is_compressed, load_compressed, read_list
from .config import EngineConfig
from .errors import CheckpointError, ConfigError
from .memory.device import cache_memory, free_memory, host_memory, library_memory, memory_of
from .memory.experts.cache import ExpertCache
from .memory.plan import Plan, gib, plan_memory
from .memory.streaming.coded import stream_of
from .memory.streaming.layers import LayerStream
from .model.config import ModelConfig, cache_groups
from .model.decoder import Decoder
from .model.integers import allow_integers, choose_integers
from .model.packed import pack_decoder, packable, round_decoder
from .model.storage import Storage, storage_of
from .narrow import (
    check_alike,
    expected_token_bytes,
    key_weights,
    kv_formats,
    second_share,
    token_bytes,
)
from .precision import Precision
from .running.caches import NarrowCaches, PlainCaches
from .running.graphs import GraphRecorder
from .running.host_blocks import HostBlocks
from .running.replayed import Replaying, can_replay
from .running.runner import ModelRunner
from .scheduling.sizing import CachePlan, plan_cache
from .scheduling.workspace import rows_of
from .text.tokenizer import Tokenizer
from .weights import blank_decoder, load_decoder

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with tensors loaded so far and in all."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint on its device, ready to run."""

    config: ModelConfig
    runner: ModelRunner
    tokenizer: Tokenizer
    cache: CachePlan
    storage: Storage
    precision: Precision
    windows: tuple[int | None, ...]
    """Sliding window of each cache group."""
    device: torch.device
    dtype: torch.dtype
    parameters: int
    fingerprint: str
    """Equal weights, equal value."""

    @property
    def vocabulary(self) -> int:
        """Token ids that may go in and come out."""
        return self.config.vocabulary


def load_model(config: EngineConfig, progress: Progress | None = None) -> LoadedModel:
    """Load a checkpoint as the settings say, or without codes if its weights do not fit them.

    Raises:
        CheckpointError: the folder does not hold a Gemma 4 checkpoint that can be run.
        ConfigError: the device is not there, weights or cache do not fit, a compressed checkpoint
            would be packed again or is not as the knobs say, or layers of a kind are not alike and
            `max_error` needs them to be.
    """
    # Errors in words: whoever keeps them would keep all that was loaded with them.
    try:
        return _load_as_coded(config, progress)
    except torch.OutOfMemoryError as error:
        text = str(error)
    knob = config.cache_knob
    remedy = f"lower {knob}" if knob else "give knobs.memory_budget, so that layers are streamed"
    raise ConfigError(f"{config.model} has no room: {text}: {remedy}, or end what else runs there")


def _load_as_coded(config: EngineConfig, progress: Progress | None) -> LoadedModel:
    """See `load_model`; raises OutOfMemoryError too."""
    try:
        return _load(config, progress)
    except CodeError as error:
        text = str(error)
        log.warning("%s is loaded again, as if stream_coded were false: %s", config.model, text)
    if torch.cuda.is_available():  # what the first attempt took
        torch.cuda.empty_cache()
    return _load(config.model_copy(update={"stream_coded": False}), progress)


def _load(config: EngineConfig, progress: Progress | None) -> LoadedModel:
    """See `load_model`; raises CodeError too."""
    folder = config.model
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the path of a checkpoint")
    if is_compressed(folder):
        if config.weight_format is not None:
            raise ConfigError(
                f"weight_format is {config.weight_format}, but {folder} is compressed already: "
                "leave it out"
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
    if config.knobs.max_error is not None:
        check_alike(model)
    blank = blank_decoder(model)
    format = None if is_compressed(folder) else weight_format(config)
    formats = formats_of(folder, model, blank, format)
    storage = storage_of(blank, formats, dtype, packed=device.type != "cpu")
    if is_compressed(folder):
        check_knobs(config, storage)
    budget = _plan(config, model, storage, device, dtype)
    _check_cache(config, model, storage, budget, device, dtype)
    stream = _stream(budget, device)
    with ExitStack() as undo:
        if stream is not None:
            undo.callback(stream.close)
        decoder = _decoder(config, model, device, dtype, format, stream, progress)
        memory = cache_memory(device) if budget is None else budget.cache
        plan, caches, kv_error = _caches(config, model, decoder, memory, device, dtype)
        host = _host_blocks(plan, caches, model, device)
        if host is not None:
            undo.callback(host.close)
        size = config.block_size
        loaded = LoadedModel(
            config=model,
            runner=ModelRunner(
                *(decoder, model, caches, size, device, dtype, stream, host),
                _replaying(config, decoder, plan, device, dtype),
            ),
            tokenizer=tokenizer,
            cache=plan,
            storage=storage,
            precision=replace(storage.precision, kv_error=kv_error),
            windows=tuple(group.window for group in cache_groups(model)),
            device=device,
            dtype=dtype,
            parameters=sum(parameter.numel() for parameter in blank.parameters()),
            fingerprint=fingerprint(folder) + _packed_as(format, config),
        )
        undo.pop_all()
    return loaded


def _decoder(
    config: EngineConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    format: Format | None,
    stream: LayerStream | ExpertCache | None,
    progress: Progress | None,
) -> Decoder:
    """The decoder of either kind of checkpoint, packed into `format` and streamed if so asked."""
    folder, error, integers = config.model, config.prompt_error, 0

    def settle(decoder: Decoder, layer: int) -> None:
        nonlocal integers
        if format is not None:
            change = round_decoder if device.type == "cpu" else pack_decoder
            change(decoder, format, layer, whole=error is not None)
        if error is not None:
            integers += allow_integers(decoder, layer, error)
        if stream is not None:
            stream.take(decoder, layer)

    if is_compressed(folder):
        decoder = load_compressed(folder, model, device, dtype, progress, settle=settle)
    else:
        decoder = load_decoder(folder, model, device, dtype, progress, settle)
    if device.type == "cuda":  # what single layers took on their way
        torch.cuda.empty_cache()
    if stream is not None:
        stream.start(decoder)
    if error is not None:
        choose_integers(decoder, integers, device, dtype)
    return decoder


def _stream(budget: Plan | None, device: torch.device) -> LayerStream | ExpertCache | None:
    """What brings the weights that do not fit, if there are any."""
    if budget is None:
        return None
    if budget.experts is not None:
        return ExpertCache(budget.experts, device, predict=budget.ahead > 0)
    if budget.residency.streamed or budget.residency.working:
        return stream_of(budget.residency, device, prefetch=budget.ahead > 0)
    return None


def _caches(
    config: EngineConfig,
    model: ModelConfig,
    decoder: Decoder,
    memory: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[CachePlan, PlainCaches | NarrowCaches, float]:
    """The KV cache in so much memory, and the least error that it can keep vectors within."""
    groups, size = cache_groups(model), config.block_size
    context, error = model.max_position_embeddings, config.knobs.max_error
    if error is None:
        bytes_each = [group.bytes_per_token(dtype.itemsize) for group in groups]
        plan = plan_cache(config, groups, context, bytes_each, memory)
        return plan, PlainCaches.empty(model, plan.blocks, size, device, dtype), 0.0
    weights = key_weights(decoder)
    formats = kv_formats(model, groups, error, weights)
    shares = [second_share(format, error) for format in formats]
    bytes_each = [token_bytes(*each) for each in zip(groups, formats, shares, strict=True)]
    plan = plan_cache(config, groups, context, bytes_each, memory)
    caches = NarrowCaches(
        *(model, formats, shares, plan.blocks, size),
        *(weights, plan.max_context, error, device),
    )
    return plan, caches, max(format.worst for format in formats)


def _host_blocks(
    plan: CachePlan, caches: PlainCaches | NarrowCaches, model: ModelConfig, device: torch.device
) -> HostBlocks | None:
    """Room on the host for what falls out of the cache, if any is asked for."""
    if not plan.host:
        return None
    assert isinstance(caches, PlainCaches), "the settings exclude narrow numbers"
    return HostBlocks(caches.tensors, cache_groups(model), plan.host, device)


def _replaying(
    config: EngineConfig,
    decoder: Decoder,
    plan: CachePlan,
    device: torch.device,
    dtype: torch.dtype,
) -> Replaying | None:
    """How decode steps are recorded, if they can be."""
    if not (config.cuda_graphs and can_replay(decoder, device, dtype)):
        return None
    return Replaying(GraphRecorder(device), rows_of(config), plan.max_context)


def _packed_as(format: Format | None, config: EngineConfig) -> str:
    """What loading made of a plain checkpoint's weights, for its fingerprint."""
    whole = "" if config.prompt_error is None else ", whole scales"
    return "" if format is None else f" {format}{whole}"


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
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device is {name!r}; choose auto, cpu, cuda, cuda:0, ...")
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


def weight_format(config: EngineConfig) -> Format | None:
    """What loading packs a plain checkpoint into."""
    text = config.weight_format or config.knobs.weight_format
    try:
        return None if text is None else Format.parse(text)
    except LayoutError as error:
        raise ConfigError(f"weight_format: {error}") from error


def formats_of(
    folder: Path, model: ModelConfig, blank: Decoder, format: Format | None
) -> Mapping[str, Format]:
    """Of the weights that are compressed on the disk, or will be on loading, by name.

    Of a compressed checkpoint only what lists its weights is read.
    """
    if is_compressed(folder):
        manifest, _ = read_list(folder, model)
        return {name: Format.parse(own.format) for name, own in manifest.weights.items()}
    return formats_on_loading(blank, format)


def formats_on_loading(blank: Decoder, format: Format | None) -> Mapping[str, Format]:
    """The same of a plain checkpoint that is packed into `format`, if there is one."""
    names = (name for names in packable(blank).values() for name in names)
    return {} if format is None else dict.fromkeys(names, format)


def check_knobs(config: EngineConfig, storage: Storage) -> None:
    """ConfigError if a compressed checkpoint is not what the knobs would make of its original."""
    if missed := config.knobs.misses(storage.precision):
        raise ConfigError(
            f"{config.model} is compressed in another way than the knobs ask: {'; '.join(missed)}. "
            "Leave these knobs out, or make such a checkpoint of its original with "
            "`conclave compress`"
        )


def _plan(
    config: EngineConfig,
    model: ModelConfig,
    storage: Storage,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan | None:
    """How the budget is divided up, if there is one.

    Raises ConfigError, before anything is loaded, if the device has not so much free or it does not
    suffice.
    """
    budget = config.knobs.budget(memory_of(device))
    if budget is None:
        return None
    # A host gives the memory of its file cache away when it is asked for.
    if device.type == "cuda" and budget > free_memory(device):
        raise ConfigError(
            f"knobs.memory_budget is {gib(budget)}, but {device} has {gib(free_memory(device))} "
            "free; lower it, or end what else runs there"
        )
    bytes_each = expected_token_bytes(model, config.knobs.max_error, dtype.itemsize)
    library = library_memory(device)
    graphs = config.cuda_graphs and device.type == "cuda"
    sizes = budget, dtype.itemsize, bytes_each, library
    return plan_memory(config, model, storage, *sizes, graphs=graphs)


def _check_cache(
    config: EngineConfig,
    model: ModelConfig,
    storage: Storage,
    budget: Plan | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """ConfigError, before anything is loaded, if the cache that is asked for has no room."""
    groups, context = cache_groups(model), model.max_position_embeddings
    bytes_each = expected_token_bytes(model, config.knobs.max_error, dtype.itemsize)
    memory = memory_of(device) if budget is None else budget.cache
    cache = plan_cache(config, groups, context, bytes_each, memory).bytes
    weights = storage.bytes if budget is None else budget.rest + budget.weights
    if device.type == "cuda":  # what was let go before is free as well
        torch.cuda.empty_cache()
    free = free_memory(device) if device.type == "cuda" else host_memory()
    if config.cache_knob is not None and weights + cache > free:
        raise ConfigError(
            f"the KV cache takes {gib(cache)} and weights {gib(weights)}, but {device} has "
            f"{gib(free)} free: lower {config.cache_knob}"
        )
