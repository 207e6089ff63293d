"""What a decoder's weights take and what is left of them, told before any memory is."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from ...kernels.errors import LayoutError
from ...kernels.formats import SPAN, Format, packed_bytes, tensor_shapes
from ...kernels.lossless.codes import Code, code_of
from ...kernels.scratch import MOST_EXPANDED
from ..errors import ConfigError
from ..precision import Precision
from .config import ExpertsConfig
from .decoder import Decoder
from .packed import PLAIN, packable

ALIGNMENT = 256
"""Bytes: where tensors of one block of memory begin, as kernels and copies want it."""


def aligned(size: int) -> int:
    """`size` in bytes, rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class LayerStorage:
    """The large weights of one layer: attention's, the MLP's, the experts'."""

    block: int
    """Bytes in one block of memory, each tensor aligned."""
    modules: tuple[int, ...]
    """The same by the modules that own them, as `packed.large_modules` tells them."""
    coded_modules: tuple[int, ...]
    """The same where each tensor that has a shorter code is in that."""
    expert_block: int
    """Of them those of experts."""
    weights: int
    """Numbers, experts' left out, by which each token is multiplied."""
    expert_weights: int
    """Numbers of all experts."""
    experts: int = 0
    """How many."""
    expert_parts: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    """Shape and dtype of each tensor of one expert, in the order of `packed.large_tensors`."""

    def read(self, tokens: int, experts: ExpertsConfig | None) -> float:
        """Bytes that a step of so many tokens reads: of experts those that it is sure to, at most.

        `experts` are those of this layer.
        """
        share = 0.0 if experts is None else min(1.0, tokens * experts.active / experts.count)
        return self.block - self.expert_block * (1 - share)

    @property
    def coded(self) -> int:
        """Bytes of the block where each tensor that has a shorter code is in that."""
        return sum(self.coded_modules)


@dataclass(frozen=True, slots=True)
class Storage:
    """The weights of one model on its device."""

    bytes: int
    rest: int
    """Bytes of what is not a layer's large weights: embeddings, head, norms, routers."""
    layers: tuple[LayerStorage, ...]
    expanded: int
    """Bytes of the largest packed matrix when it is written out dense, as for long prompts, or of
    the largest part that is at once."""
    precision: Precision

    @property
    def largest_module(self) -> int:
        """Bytes of the largest one of all layers: room for any of them to run from."""
        return max(size for layer in self.layers for size in layer.modules)


def storage_of(
    decoder: Decoder, formats: Mapping[str, Format], dtype: torch.dtype, packed: bool
) -> Storage:
    """How the weights of a decoder, which may be a blank one, are stored.

    Args:
        decoder: tells their names and shapes.
        formats: of those that are compressed, by name.
        dtype: of all others.
        packed: whether the compressed ones stay so, or are unpacked into `dtype`.

    Raises:
        ConfigError: a format does not fit its weight.
    """
    large = {name for names in packable(decoder).values() for name in names}
    plain_bits = 8 * dtype.itemsize
    size = expanded = weights = large_bytes = 0
    pruned, fewest = 0.0, plain_bits
    for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        format, dense = formats.get(name), tensor.numel() * dtype.itemsize
        own = dense if format is None or not packed else _packed(name, tensor.shape, format)
        size += own
        if format is not None and packed and tensor.dim() == 2:
            expanded = max(expanded, min(dense, MOST_EXPANDED * dtype.itemsize))
        if name in large:
            weights += tensor.numel()
            large_bytes += own
            pruned += 0 if format is None else tensor.numel() * (1 - format.kept / SPAN)
            fewest = min(fewest, plain_bits if format is None else format.bits)
    precision = Precision(pruned / weights, fewest, 8 * large_bytes / weights)
    stored = formats if packed else {}
    layers = tuple(_layer(decoder, index, stored, dtype) for index in range(len(decoder.layers)))
    return Storage(size, size - large_bytes, layers, expanded, precision)


def _layer(
    decoder: Decoder, index: int, formats: Mapping[str, Format], dtype: torch.dtype
) -> LayerStorage:
    block = expert_block = weights = expert_weights = experts = 0
    modules: Counter[str] = Counter()
    coded: Counter[str] = Counter()
    parts: list[tuple[tuple[int, ...], torch.dtype]] = []
    for name in (name for names in packable(decoder, index).values() for name in names):
        tensor = decoder.get_parameter(name)
        tensors = _tensors(tensor.shape, formats.get(name), dtype)
        own = sum(aligned(each.bytes) for each in tensors)
        block += own
        module = name.rpartition(".")[0]
        modules[module] += own
        coded[module] += sum(aligned(each.coded_bytes) for each in tensors)
        if tensor.dim() == 3:
            expert_block += own
            expert_weights += tensor.numel()
            experts = tensor.shape[0]
            each = _tensors(tensor.shape[1:], formats.get(name), dtype)
            parts += ((own.shape, own.dtype) for own in each)
        else:
            weights += tensor.numel()
    sizes = tuple(modules.values()), tuple(coded.values())
    numbers = expert_block, weights, expert_weights, experts
    return LayerStorage(block, *sizes, *numbers, tuple(parts))


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    code: Code | None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def coded_bytes(self) -> int:
        return self.bytes if self.code is None else self.code.bytes


def _tensors(shape: torch.Size, format: Format | None, dtype: torch.dtype) -> list[_Tensor]:
    """Of one weight, experts stacked."""
    if format is None:
        return [_Tensor(tuple(shape), dtype, code_of(PLAIN, None, tuple(shape), dtype))]
    experts = shape[0] if len(shape) == 3 else None
    found = tensor_shapes(format, shape[-2], shape[-1], experts).items()
    return [_Tensor(*own, code_of(field, format, *own)) for field, own in found]


def _packed(name: str, shape: torch.Size, format: Format) -> int:
    experts = shape[0] if len(shape) == 3 else 1
    try:
        return packed_bytes(format, shape[-2], shape[-1], experts)
    except LayoutError as error:
        raise ConfigError(f"{name} cannot be stored as {format}: {error}") from error
