"""Fills a decoder from safetensors: which tensor of a checkpoint goes where, and getting it there.

`tensor_map` is the one table of names. It maps a checkpoint's name, without its prefix, to rows of
a parameter of ours; fused parameters hold row blocks in this order:

    layers.N.attention.qkv.weight             q_proj, k_proj, v_proj (no v on k_eq_v layers; q alone
                                              on layers that read another layer's keys)
    layers.N.attention.head_norms             q_norm, k_norm
    layers.N.feed_forward.mlp.gate_up.weight  gate_proj, up_proj

Files are mapped, and each tensor is copied once, straight into its rows on the target device and in
the target dtype. All headers are checked before any memory is allocated, and every wrong tensor is
named at once. What it gave up: quantized checkpoints (the config refuses them).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import CheckpointError
from .model.config import LayerConfig, ModelConfig
from .model.decoder import Decoder

PREFIXES = ("model.language_model.", "model.", "")
FOREIGN = re.compile(
    r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder)\."
)
"""Towers of wrapper checkpoints that a text decoder leaves on the disk."""
DTYPES = ("BF16", "F16", "F32", "F64")

Settle = Callable[[Decoder, int], None]
"""Told of a decoder and the number of a layer that has just been loaded, before the next one is."""

Change = Callable[[str, Tensor], Tensor]
"""What a tensor, by its name without prefix, becomes on its way from the checkpoint."""


@dataclass(frozen=True, slots=True)
class Target:
    """Rows [start, start + shape[0]) of one of the decoder's parameters or buffers."""

    parameter: str
    start: int
    shape: tuple[int, ...]

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rows themselves, writable, of shape `shape`."""
        return tensors[self.parameter].narrow(0, self.start, self.shape[0])


class CheckpointReader:
    """The files of a checkpoint folder, mapped and checked; close it, or use it in a `with`.

    Reads model.safetensors, or the shards that model.safetensors.index.json lists. Raises
    CheckpointError naming the tensors that are missing, unexpected or of a wrong shape or dtype,
    and for files that are missing or broken.
    """

    def __init__(self, folder: Path, config: ModelConfig, change: Change | None = None) -> None:
        self._table = tensor_map(config)
        self._change = change
        with ExitStack() as stack:
            self._sources = _sources(open_files(folder, stack), config, self._table)
            _check(self._sources, self._table)
            self._files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 if every tensor is that, else float32."""
        stored = (file.get_slice(name).get_dtype() for file, name in self._sources.values())
        return torch.bfloat16 if all(dtype == "BF16" for dtype in stored) else torch.float32

    @property
    def count(self) -> int:
        """Tensors that the decoder takes from the checkpoint."""
        return len(self._sources)

    def fill(
        self, tensors: Mapping[str, Tensor], progress: Callable[[], None] | None = None
    ) -> None:
        """Copies what the checkpoint has for each of `tensors`, named as in `model_tensors`.

        `progress` is called after each.
        """
        for name in self._sources:
            if self._table[name].parameter not in tensors:
                continue
            file, stored = self._sources[name]
            tensor = file.get_tensor(stored)
            with torch.no_grad():
                changed = tensor if self._change is None else self._change(name, tensor)
                self._table[name].view(tensors).copy_(changed)
            if progress is not None:
                progress()


def load_decoder(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    settle: Settle | None = None,
) -> Decoder:
    """The decoder of a checkpoint folder, on `device` in `dtype`; see `CheckpointReader`.

    One layer after the other, each with a call of `settle`, then the rest. `progress` is told
    (tensors loaded, tensors in all) after each tensor.
    """
    done = count(1)
    with CheckpointReader(folder, config) as reader:

        def told() -> None:
            if progress is not None:
                progress(next(done), reader.count)

        decoder = blank_decoder(config)
        for index, layer in enumerate(decoder.layers):
            allocate(layer, device, dtype)
            prefix = f"layers.{index}."
            own = {prefix + name: each for name, each in model_tensors(layer).items()}
            reader.fill(own, told)
            if settle is not None:
                settle(decoder, index)
        allocate(decoder, device, dtype)
        every = model_tensors(decoder).items()
        rest = {name: each for name, each in every if not name.startswith("layers.")}
        reader.fill(rest, told)
    return decoder.eval()


def blank_decoder(config: ModelConfig) -> Decoder:
    """A decoder without storage: names and shapes alone."""
    with torch.device("meta"):
        return Decoder(config)


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives storage to those parameters and buffers of a module that have none ("meta").

    On a CPU matrices lie column by column in memory (their shapes are as ever): one token's product
    reads them a quarter faster that way. Take `.contiguous()` before saving one.
    """
    tied = module.embedding if isinstance(module, Decoder) and module.head is None else None
    for part in module.modules():
        multiplied = isinstance(part, nn.Linear) or part is tied
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if multiplied and device.type == "cpu":
                storage = torch.empty(parameter.shape[::-1], device=device, dtype=dtype).t()
            else:
                storage = torch.empty(parameter.shape, device=device, dtype=dtype)
            setattr(part, name, nn.Parameter(storage))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.empty(buffer.shape, device=device, dtype=dtype))
            else:
                setattr(part, name, buffer.to(device))


def model_tensors(decoder: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that `tensor_map` uses."""
    return {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}


def tensor_map(config: ModelConfig) -> dict[str, Target]:
    """Every tensor of a checkpoint that the decoder needs: name without prefix to target."""
    size = config.hidden_size
    table = {
        "embed_tokens.weight": Target("embedding.weight", 0, (config.vocab_size, size)),
        "norm.weight": Target("norm.weight", 0, (size,)),
    }
    if not config.tied_head:
        table["lm_head.weight"] = Target("head.weight", 0, (config.vocab_size, size))
    if inner := config.per_layer_input_size:
        width = inner * len(config.layers)
        rows = config.per_layer_vocab_size
        table |= {
            "embed_tokens_per_layer.weight": Target("per_layer.embedding.weight", 0, (rows, width)),
            "per_layer_model_projection.weight": Target(
                "per_layer.projection.weight", 0, (width, size)
            ),
            "per_layer_projection_norm.weight": Target("per_layer.norm.weight", 0, (inner,)),
        }
    for index, layer in enumerate(config.layers):
        entries = (
            *_attention_entries(layer, layer.kv_source == index, size),
            *_feed_forward_entries(layer, size),
            *_layer_entries(config.per_layer_input_size, size),
        )
        for name, parameter, start, shape in entries:
            target = Target(f"layers.{index}.{parameter}", start, shape)
            table[f"layers.{index}.{name}"] = target
    return table


def dead_tensors(config: ModelConfig) -> set[str]:
    """Names without prefix of what E2B and E4B checkpoints still carry and no layer reads."""
    return {
        f"layers.{index}.self_attn.{name}.weight"
        for index, layer in enumerate(config.layers)
        if layer.kv_source != index
        for name in ("k_proj", "v_proj", "k_norm", "v_norm")
    }


Entry = tuple[str, str, int, tuple[int, ...]]
"""Checkpoint name, our name, first row, shape; both names within their layer."""


def _attention_entries(layer: LayerConfig, owns_keys: bool, size: int) -> Iterator[Entry]:
    queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    yield "self_attn.q_proj.weight", "attention.qkv.weight", 0, (queries, size)
    yield "self_attn.q_norm.weight", "attention.head_norms", 0, (layer.head_dim,)
    yield "self_attn.o_proj.weight", "attention.out.weight", 0, (size, queries)
    if not owns_keys:
        return
    yield "self_attn.k_proj.weight", "attention.qkv.weight", queries, (keys, size)
    yield "self_attn.k_norm.weight", "attention.head_norms", layer.head_dim, (layer.head_dim,)
    if layer.has_value_projection:
        yield "self_attn.v_proj.weight", "attention.qkv.weight", queries + keys, (keys, size)


def _feed_forward_entries(layer: LayerConfig, size: int) -> Iterator[Entry]:
    inner = layer.intermediate_size
    yield "mlp.gate_proj.weight", "feed_forward.mlp.gate_up.weight", 0, (inner, size)
    yield "mlp.up_proj.weight", "feed_forward.mlp.gate_up.weight", inner, (inner, size)
    yield "mlp.down_proj.weight", "feed_forward.mlp.down.weight", 0, (size, inner)
    yield "pre_feedforward_layernorm.weight", "feed_forward.norm.weight", 0, (size,)
    if layer.experts is None:
        return
    count, inner = layer.experts.count, layer.experts.intermediate_size
    ours = "feed_forward.experts."
    yield "router.proj.weight", ours + "router.weight", 0, (count, size)
    yield "router.scale", ours + "router_scale", 0, (size,)
    yield "router.per_expert_scale", ours + "expert_scale", 0, (count,)
    yield "experts.gate_up_proj", ours + "gate_up", 0, (count, 2 * inner, size)
    yield "experts.down_proj", ours + "down", 0, (count, size, inner)
    for theirs, norm in (
        ("post_feedforward_layernorm_1", "mlp_output_norm"),
        ("pre_feedforward_layernorm_2", "experts_input_norm"),
        ("post_feedforward_layernorm_2", "experts_output_norm"),
    ):
        yield f"{theirs}.weight", f"feed_forward.{norm}.weight", 0, (size,)


def _layer_entries(per_layer_size: int, size: int) -> Iterator[Entry]:
    yield "input_layernorm.weight", "attention_norm.weight", 0, (size,)
    yield "post_attention_layernorm.weight", "attention_output_norm.weight", 0, (size,)
    yield "post_feedforward_layernorm.weight", "feed_forward_output_norm.weight", 0, (size,)
    yield "layer_scalar", "scalar", 0, (1,)
    if per_layer_size:
        yield (
            "per_layer_input_gate.weight",
            "per_layer_input.gate.weight",
            0,
            (per_layer_size, size),
        )
        yield "per_layer_projection.weight", "per_layer_input.out.weight", 0, (size, per_layer_size)
        yield "post_per_layer_input_norm.weight", "per_layer_input.norm.weight", 0, (size,)


def open_files(folder: Path, stack: ExitStack) -> list[Any]:
    """The checkpoint's safetensors files, mapped and open as long as `stack`."""
    index = folder / "model.safetensors.index.json"
    names = _shard_names(index) if index.exists() else ["model.safetensors"]
    files = []
    for name in names:
        try:
            files.append(stack.enter_context(safe_open(folder / name, framework="pt")))
        except FileNotFoundError:
            raise CheckpointError(f"{folder / name} does not exist: fetch it again") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / name} is no readable safetensors file ({error}): fetch it again"
            ) from error
    return files


def _shard_names(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if all(Path(name).name == name for name in names):
            return sorted(set(names))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no readable index of shards: {error!r}") from error
    raise CheckpointError(f"{index} names files outside its folder")


def _sources(
    files: list[Any], config: ModelConfig, table: Mapping[str, Target]
) -> dict[str, tuple[Any, str]]:
    """Name without prefix to (file, name in the file), ignored tensors left out."""
    ignored = dead_tensors(config)
    if config.tied_head:
        ignored |= {f"{prefix}lm_head.weight" for prefix in PREFIXES}
    sources: dict[str, tuple[Any, str]] = {}
    for file in files:
        for stored in file.keys():
            prefix = next(prefix for prefix in PREFIXES if stored.startswith(prefix))
            name = stored.removeprefix(prefix)
            if FOREIGN.match(stored) or name in ignored or stored in ignored:
                continue
            if name in sources:
                raise CheckpointError(
                    f"{stored} and {sources[name][1]} are the same tensor: keep one of them"
                )
            # A name we do not know keeps its prefix, to be recognised in the error.
            sources[name if name in table else stored] = (file, stored)
    return sources


def _check(sources: Mapping[str, tuple[Any, str]], table: Mapping[str, Target]) -> None:
    """Compares names, shapes and dtypes; raises one CheckpointError with everything found."""
    missing = [name for name in table if name not in sources]
    unexpected, misshaped = [], []
    for name, (file, stored) in sources.items():
        if name not in table:
            unexpected.append(name)
            continue
        header = file.get_slice(stored)
        shape = tuple(header.get_shape())
        if shape != table[name].shape or header.get_dtype() not in DTYPES:
            expected = f"expected {list(table[name].shape)} of {', '.join(DTYPES)}"
            misshaped.append(f"{stored} is {list(shape)} {header.get_dtype()}, {expected}")
    findings = [
        f"{len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of wrong shape or dtype", misshaped),
        )
        if names
    ]
    if findings:
        raise CheckpointError(
            "the tensors do not fit config.json; "
            + "; ".join(findings)
            + ". Take config.json and the safetensors files from the same Gemma 4 checkpoint"
        )
