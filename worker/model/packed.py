"""A decoder whose large weights are in a compressed format: attention's, the MLP's, the experts'.

Packing has no data to tell which weights matter: the largest survive. So int8 changes little and a
sparse format much. Embeddings, head, router, norms and per-layer inputs stay. Where there are no
kernels, on a CPU, a weight would be unpacked for every product; there `round_decoder` is for.
"""

import torch
from torch import Tensor, nn

from ...kernels.errors import LayoutError
from ...kernels.layouts import Format, PackedWeight, pack, unpack
from ...kernels.linear import gated_linear, grouped_linear, linear
from ..errors import ConfigError
from .decoder import Decoder
from .layers import MLP, Experts

_PACKED = (
    *("attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp.down.weight"),
    *("experts.gate_up", "experts.down"),
)
"""How the names of the weights end that are packed."""


class PackedLinear(nn.Module):
    """x weight^T, [..., K] to [..., R]."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight)


class PackedMLP(nn.Module):
    """As `MLP`, but rows of gate and up alternate in `gate_up`."""

    def __init__(self, gate_up: PackedWeight, down: PackedWeight) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(gated_linear(hidden, self.gate_up), self.down)


class PackedExperts(Experts):
    """As `Experts`, with its router, but never waits for the device."""

    def __init__(self, like: Experts, gate_up: PackedWeight, down: PackedWeight) -> None:
        nn.Module.__init__(self)
        self.active = like.active
        self.epsilon = like.epsilon
        self.router = like.router
        self.router_scale = like.router_scale
        self.expert_scale = like.expert_scale
        self.packed = gate_up, down

    def run(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """See `Experts.run`."""
        gate_up, down = self.packed
        experts = chosen.int()
        return grouped_linear(grouped_linear(inputs, gate_up, experts, gated=True), down, experts)


def pack_decoder(decoder: Decoder, format: Format) -> None:
    """Bring the large weights of every layer into `format`, in place, one after the other.

    Raises ConfigError, which names the weight, if the format does not fit it.
    """
    with torch.no_grad():
        for name, module in list(decoder.named_modules()):
            if packed := _packed(name, module, format):
                decoder.set_submodule(name, packed)


def round_decoder(decoder: Decoder, format: Format) -> None:
    """Give the same weights the values that `pack_decoder` would keep, and leave them dense."""
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.endswith(_PACKED):
                weight.copy_(unpack(_pack(name, weight, format)))


def _packed(name: str, module: nn.Module, format: Format) -> nn.Module | None:
    """What takes the place of a module, if anything does."""
    if isinstance(module, nn.Linear) and f"{name}.weight".endswith(_PACKED[:2]):
        return PackedLinear(_pack(f"{name}.weight", module.weight, format))
    if isinstance(module, MLP):
        gate_up = _pack(f"{name}.gate_up", _alternating(module.gate_up.weight), format)
        return PackedMLP(gate_up, _pack(f"{name}.down", module.down.weight, format))
    if isinstance(module, Experts):
        gate_up = _pack(f"{name}.gate_up", _alternating(module.gate_up), format)
        return PackedExperts(module, gate_up, _pack(f"{name}.down", module.down, format))
    return None


def _pack(name: str, weight: Tensor, format: Format) -> PackedWeight:
    try:
        return pack(weight, format)
    except LayoutError as error:
        raise ConfigError(f"{name} cannot be stored as {format}: {error}") from error


def _alternating(gate_up: Tensor) -> Tensor:
    """[..., 2F, K] with rows of gate and up in turn, from those of gate, then up."""
    halves: Tensor = gate_up.unflatten(-2, (2, -1))
    return halves.transpose(-2, -3).flatten(-3, -2)
