"""A checkpoint compressed one decoder layer at a time.

The device holds one layer, in float32, and one batch of activations; all other activations lie in
host memory, and weights come from the files as they are needed. Each layer sees the inputs that the
compressed layers before it give, so errors are made up for where that is possible. Layers that are
finished are on the disk: after a kill they are only run again, and the result has the same bytes.
What it gave up: a layer's own weights all see the inputs of the uncompressed layer.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.errors import LayoutError
from ...kernels.formats import Format, PackedWeight, from_tensors
from ...kernels.layouts import unpack
from ..errors import ConfigError
from ..model.config import ModelConfig
from ..model.decoder import Decoder, DenseAttention
from ..model.layers import DecoderLayer
from ..model.packed import fill, packed_order
from ..weights import CheckpointReader, allocate, model_tensors
from .allocation import Sensitivity, sensitivity
from .calibration import Moments, Shares
from .checkpoint import CheckpointWriter
from .contents import layer_file
from .manifest import REST
from .pruning import Mode, compress, output_error
from .recipe import Outcome, Recipe
from .sources.adapter import Adapter
from .sources.like import Like
from .tables import pack_tables

BATCH = 4
"""Sequences that run at once."""
LEAST_INPUTS = 64
"""An expert that has seen fewer is pruned by its weights alone."""
WEIGHTS = (
    *("attention.qkv.weight", "attention.out.weight"),
    *("feed_forward.mlp.gate_up.weight", "feed_forward.mlp.down.weight"),
    *("feed_forward.experts.gate_up", "feed_forward.experts.down"),
)


Told = Callable[[int, int], None]
"""(layers done, layers in all)"""


def compress_checkpoint(
    source: Path,
    target: Path,
    recipe: Recipe,
    tokens: Tensor,
    device: torch.device,
    about: dict[str, object],
    told: Told = lambda done, layers: None,
    adapter: Adapter | None = None,
    like: Like | None = None,
) -> list[Outcome]:
    """Compress the checkpoint in `source` into `target`, or go on where that was left.

    `tokens` is int64 [sequences, length] of calibration text. `about` tells where the result comes
    from and goes into conclave.json, with what became of every weight. An `adapter` is merged into
    the source first. If the recipe is that of a `like`, the same weights survive as there. Raises
    CheckpointError, and ConfigError for a weight that does not fit or a folder that holds something
    else.
    """
    config = ModelConfig.load(source)
    outcomes: list[Outcome] = []
    if adapter is not None:
        about = {**about, "adapter": adapter.about()}
    if like is not None:
        about = {**about, "like": like.fingerprint}
    with _reader(source, config, adapter) as reader, torch.inference_mode():
        writer = CheckpointWriter(target, source, _key(recipe, tokens, about))
        finished = writer.finished_layers()
        rest = _without_layers(config, reader)
        maps_of_tables = {} if like is None else like.maps(REST)
        tables, rounded = pack_tables(rest, recipe, maps_of_tables, device)
        run = _Run(config, rest, tokens, device)
        for index in range(len(config.layers)):
            layer = _layer(index, config, reader, device)
            with Moments(layer) as moments:
                run.through(index, layer, keep=False)
            made = _stored_weights(writer, index) if index in finished else {}
            maps = {} if like is None or index in finished else like.maps(layer_file(index))
            packed = _compress_layer(index, layer, recipe, moments, made, maps, outcomes)
            if index not in finished:
                writer.write_layer(index, _for_file(index, layer, packed, reader.dtype))
            run.through(index, layer, keep=True)
            told(index + 1, len(config.layers))
        state = {name: own for name, own in rest.state_dict().items() if name not in tables}
        plain = {name: own.to(reader.dtype).contiguous() for name, own in state.items()}
        writer.write_rest({**plain, **tables})
        outcomes += rounded
        writer.finish({**about, "weights": [asdict(outcome) for outcome in outcomes]})
    return outcomes


def measure(
    source: Path,
    tokens: Tensor,
    device: torch.device,
    told: Told = lambda done, layers: None,
    adapter: Adapter | None = None,
) -> dict[str, Sensitivity]:
    """How much pruning harms each weight of the full checkpoint, by name; see `allocation`."""
    config = ModelConfig.load(source)
    found: dict[str, Sensitivity] = {}
    with _reader(source, config, adapter) as reader, torch.inference_mode():
        run = _Run(config, _without_layers(config, reader), tokens, device)
        for index in range(len(config.layers)):
            layer = _layer(index, config, reader, device)
            with Moments(layer) as moments, Shares(layer) as shares:
                run.through(index, layer, keep=True)
            tensors = model_tensors(layer)
            for name in filter(tensors.__contains__, WEIGHTS):
                sums, counts = moments.sums[name], moments.counts[name]
                full = f"layers.{index}.{name}"
                found[full] = _sensitivity_of(tensors[name], sums, counts).times(shares.of(name))
            told(index + 1, len(config.layers))
    return found


def _reader(source: Path, config: ModelConfig, adapter: Adapter | None) -> CheckpointReader:
    return CheckpointReader(source, config, None if adapter is None else adapter.change)


def _sensitivity_of(weight: Tensor, sums: Tensor, counts: Tensor) -> Sensitivity:
    """Of one weight, or of a stack: the mean over its experts that have seen inputs."""
    if weight.dim() == 2:
        return sensitivity(weight, sums)
    each = [sensitivity(weight[index], sums[index]) for index in counts.nonzero().flatten()]
    each = each or [sensitivity(weight[0], torch.eye(weight.shape[2], device=weight.device))]
    errors = {kept: sum(one.errors[kept] for one in each) / len(each) for kept in each[0].errors}
    return Sensitivity(weight.numel(), errors)


def _key(recipe: Recipe, tokens: Tensor, about: dict[str, object]) -> str:
    """What must be the same to go on with layers that are finished."""
    parts = (str(recipe), sha256(tokens.numpy().tobytes()).hexdigest(), about)
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Run:
    """Calibration activations on their way through the layers."""

    def __init__(
        self, config: ModelConfig, rest: Decoder, tokens: Tensor, device: torch.device
    ) -> None:
        self.device = device
        count, length = tokens.shape
        batches = tokens.split(BATCH)
        self.hidden: list[Tensor] = []
        self.additions: list[tuple[Tensor | None, ...]] = []
        for batch in batches:
            flat = batch.flatten()
            hidden = rest.embedding(flat) * rest.embedding_scale.to(torch.float32)
            self.hidden.append(hidden)
            none = (None,) * len(config.layers)
            self.additions.append(rest.per_layer(flat, hidden) if rest.per_layer else none)
        self.attention = [DenseAttention(config, [length] * len(batch)) for batch in batches]
        positions = torch.arange(length).repeat(min(BATCH, count))
        self.rotations = rest.rotations(positions)

    def through(self, index: int, layer: DecoderLayer, keep: bool) -> None:
        """Run every batch through a layer; its outputs take the place of the inputs if `keep`."""
        for number, hidden in enumerate(self.hidden):
            rotation = tuple(each[: len(hidden)].to(self.device) for each in self.rotations[index])
            addition = self.additions[number][index]
            output = layer(
                hidden.to(self.device),
                rotation,
                None if addition is None else addition.to(self.device),
                self.attention[number],
            )
            if keep:
                self.hidden[number] = output.to(hidden.device)


def _without_layers(config: ModelConfig, reader: CheckpointReader) -> Decoder:
    """The decoder's other parts in float32 in host memory."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.layers = nn.ModuleList()
    allocate(decoder, torch.device("cpu"), torch.float32)
    reader.fill(model_tensors(decoder))
    return decoder


def _layer(
    index: int, config: ModelConfig, reader: CheckpointReader, device: torch.device
) -> DecoderLayer:
    """One layer in float32 on the device."""
    with torch.device("meta"):
        layer = DecoderLayer(index, config.layers[index], config)
    allocate(layer, device, torch.float32)
    reader.fill({f"layers.{index}.{name}": own for name, own in model_tensors(layer).items()})
    return layer


def _compress_layer(
    index: int,
    layer: DecoderLayer,
    recipe: Recipe,
    moments: Moments,
    made: dict[str, PackedWeight],
    maps: dict[str, Tensor],
    outcomes: list[Outcome],
) -> dict[str, PackedWeight]:
    """Compress the weights of a layer that are not `made`; the layer then has what is left of them.

    `maps` tell of some which weights survive. Returns all of them, and adds what became of them to
    `outcomes`.
    """
    _check_pairs(index, recipe)
    tensors, packed = model_tensors(layer), {}
    for name in filter(tensors.__contains__, WEIGHTS):
        full = f"layers.{index}.{name}"
        format, counts = recipe.of(full), moments.counts[name]
        if format is None:
            outcomes.append(Outcome(full, "as it was", 0.0, int(counts.min()), 0))
            continue
        weight, sums = packed_order(name, tensors[name]), moments.sums[name]
        try:
            own = made.get(name) or _compress_weight(
                weight, format, recipe, sums, counts, maps.get(full)
            )
        except (LayoutError, ConfigError) as fault:
            raise ConfigError(
                f"{full} cannot be stored as {format}: {fault}; leave it as it is (--keep), or "
                "choose another format"
            ) from fault
        few = int((counts < LEAST_INPUTS).sum()) if counts.dim() else 0
        error = _error_of(weight, unpack(own), sums, counts)
        outcomes.append(Outcome(full, str(format), error, int(counts.min()), few))
        packed[name] = own
    for name, own in packed.items():
        fill(name, tensors[name], own)
    return packed


def _check_pairs(index: int, recipe: Recipe) -> None:
    """ConfigError if one weight of an MLP, or of its experts, is packed and the other is not."""
    for module in ("mlp", "experts"):
        gate_up, down = (f"layers.{index}.{name}" for name in WEIGHTS if f".{module}." in name)
        if (recipe.of(gate_up) is None) != (recipe.of(down) is None):
            raise ConfigError(
                f"{gate_up} and {down} are packed together or not at all: let a pattern name both, "
                f"such as layers.{index}.feed_forward.{module}.*"
            )


def _compress_weight(
    weight: Tensor,
    format: Format,
    recipe: Recipe,
    sums: Tensor,
    counts: Tensor,
    mask: Tensor | None,
) -> PackedWeight:
    """One weight [R, K], or each of a stack of experts [E, R, K]."""
    mask = None if mask is None else mask.to(weight.device)
    if weight.dim() == 2:
        return compress(weight, sums, format, recipe.mode, mask, recipe.whole)
    modes: list[Mode] = [
        recipe.mode if count >= LEAST_INPUTS else "magnitude" for count in counts.tolist()
    ]
    masks = [None] * len(weight) if mask is None else mask
    singles = [
        compress(own, moment, format, way, kept, recipe.whole)
        for own, moment, way, kept in zip(weight, sums, modes, masks, strict=True)
    ]
    fields = singles[0].tensors()
    stacked = {field: torch.stack([one.tensors()[field] for one in singles]) for field in fields}
    return from_tensors(format, weight.shape[1], weight.shape[2], stacked)


def _error_of(weight: Tensor, values: Tensor, sums: Tensor, counts: Tensor) -> float:
    """`Outcome.error`; of experts, the mean over those that have seen inputs."""
    if weight.dim() == 2:
        return output_error(weight, values, sums)
    seen = counts.nonzero().flatten().tolist()
    errors = [output_error(weight[index], values[index], sums[index]) for index in seen]
    return sum(errors) / max(1, len(errors))


def _stored_weights(writer: CheckpointWriter, index: int) -> dict[str, PackedWeight]:
    """The packed weights of a finished layer, by their names in it."""
    prefix, stored = f"layers.{index}.", writer.read_layer(index)
    return {
        name.removeprefix(prefix): weight
        for name, weight in stored.items()
        if isinstance(weight, PackedWeight)
    }


def _for_file(
    index: int, layer: DecoderLayer, packed: dict[str, PackedWeight], dtype: torch.dtype
) -> dict[str, Tensor | PackedWeight]:
    """What goes into the layer's file."""
    found: dict[str, Tensor | PackedWeight] = {
        name: tensor.to("cpu", dtype) for name, tensor in layer.state_dict().items()
    }
    found |= {name: weight.to("cpu") for name, weight in packed.items()}
    return {f"layers.{index}.{name}": own for name, own in found.items()}
