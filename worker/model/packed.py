"""A decoder whose large weights are in a compressed format: attention's, the MLP's, the experts'.

Packing has no data to tell which weights matter: the largest survive. So int8 changes little and a
sparse format much. Embeddings and head stay, as do router, norms and per-layer inputs; of a
compressed checkpoint they can be packed too. Where there are no kernels, on a CPU, a weight would
be unpacked for every product; there `round_decoder` is for.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ...kernels.errors import LayoutError
from ...kernels.integer.weights import pack_whole
from ...kernels.layouts import Format, PackedWeight, pack, rows_at, unpack
from ...kernels.linear import gated_linear, grouped_linear, linear
from ..errors import ConfigError
from .decoder import Decoder
from .layers import MLP, Experts, SelfAttention

MANY = 1024
"""Tokens from which on products of integers are faster than those of bfloat16, whatever the shape
(an H100)."""


class PackedLinear(nn.Module):
    """x weight^T, [..., K] to [..., R]."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.error: float | None = None
        """Of activations, where many are multiplied as integers; see `integers`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, max_error=self.error if len(hidden) >= MANY else None)


class PackedEmbedding(nn.Module):
    """As `Embedding`; only the rows of the tokens at hand are unpacked."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return rows_at(self.weight, tokens).to(self.dtype)

    def scores(self, hidden: Tensor) -> Tensor:
        """See `Embedding.scores`."""
        return linear(hidden, self.weight)


class PackedGate(nn.Module):
    """gelu(gate) * up of x weight^T, [..., K] to [..., R / 2]; rows of gate and up alternate."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.error: float | None = None
        """As of `PackedLinear`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return gated_linear(hidden, self.weight, self.error if len(hidden) >= MANY else None)


class PackedMLP(nn.Module):
    """As `MLP`."""

    def __init__(self, gate_up: PackedWeight, down: PackedWeight) -> None:
        super().__init__()
        self.gate_up = PackedGate(gate_up)
        self.down = PackedLinear(down)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down(self.gate_up(hidden))
        return output


class PackedExperts(Experts):
    """As `Experts`, with its router, but never waits for the device."""

    def __init__(self, like: Experts, gate_up: PackedWeight, down: PackedWeight) -> None:
        nn.Module.__init__(self)
        self.active = like.active
        self.count = like.count
        self.epsilon = like.epsilon
        self.router = like.router
        self.router_scale = like.router_scale
        self.expert_scale = like.expert_scale
        self.packed = gate_up, down

    def run(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """See `Experts.run`."""
        gate_up, down = self.packed
        return grouped_linear(grouped_linear(inputs, gate_up, chosen, gated=True), down, chosen)


def pack_decoder(
    decoder: Decoder, format: Format, layer: int | None = None, whole: bool = False
) -> None:
    """Bring the large weights of one layer, or of every one, into `format`, in place.

    If `whole`, scales of 4-bit formats are whole numbers of units (`kernels.integer.weights`).
    Raises ConfigError, which names the weight, if the format does not fit it.
    """
    for module, names in packable(decoder, layer).items():
        plain = [decoder.get_parameter(name) for name in names]
        weights = [_pack(*each, format, whole) for each in zip(names, plain, strict=True)]
        put_packed(decoder, module, weights, plain[0].dtype)


def round_decoder(
    decoder: Decoder, format: Format, layer: int | None = None, whole: bool = False
) -> None:
    """Give the same weights the values that `pack_decoder` would keep, and leave them dense."""
    for names in packable(decoder, layer).values():
        for name in names:
            weight = decoder.get_parameter(name)
            fill(name, weight, _pack(name, weight, format, whole))


def packable(decoder: Decoder, layer: int | None = None) -> dict[str, tuple[str, ...]]:
    """Of one layer or of all, while plain: module that can be packed -> names of its weights.

    The weights of one module are packed together or not at all.
    """
    modules: dict[str, tuple[str, ...]] = {}
    prefix = "" if layer is None else f"layers.{layer}"
    for name, module in decoder.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(module, SelfAttention):
            modules |= {f"{name}.{part}": (f"{name}.{part}.weight",) for part in ("qkv", "out")}
        elif isinstance(module, MLP):
            modules[name] = (f"{name}.gate_up.weight", f"{name}.down.weight")
        elif isinstance(module, Experts):
            modules[name] = (f"{name}.gate_up", f"{name}.down")
    return modules


PLAIN = "plain"
"""The field of a plain weight's only tensor, where those of packed ones are told apart."""


Field = tuple[str, Format | None, Tensor]
"""A tensor, its name in `PackedWeight.tensors` or `PLAIN`, and its weight's format."""


def large_tensors(layer: nn.Module) -> Iterator[Tensor]:
    """What holds a layer's large weights, plain or packed: those of attention, MLP and experts."""
    return (tensor for _, fields in large_modules(layer) for *_, tensor in fields)


def large_modules(layer: nn.Module) -> Iterator[tuple[nn.Module, list[Field]]]:
    """The same by the modules that own them; nothing reads them but the module's own forward."""
    for module, weights in _large_weights(layer):
        yield module, [field for weight in weights for field in _fields(weight)]


def _large_weights(
    layer: nn.Module,
) -> Iterator[tuple[nn.Module, tuple[Tensor | PackedWeight, ...]]]:
    for module in layer.modules():
        match module:
            case PackedLinear() | PackedGate():
                yield module, (module.weight,)
            case PackedExperts():
                yield module, module.packed
            case Experts():
                yield module, (module.gate_up, module.down)
            case MLP() | SelfAttention():
                plain = (own for own in module.children() if isinstance(own, nn.Linear))
                yield from ((own, (own.weight,)) for own in plain)


def _fields(weight: Tensor | PackedWeight) -> list[Field]:
    if isinstance(weight, Tensor):
        return [(PLAIN, None, weight)]
    return [(field, weight.format, tensor) for field, tensor in weight.tensors().items()]


def tables(decoder: Decoder) -> dict[str, tuple[str, ...]]:
    """The same of what has a row for each token: embeddings, and a head of its own."""
    modules: dict[str, tuple[str, ...]] = {"embedding": ("embedding.weight",)}
    if decoder.per_layer is not None:
        modules["per_layer.embedding"] = ("per_layer.embedding.weight",)
    if decoder.head is not None:
        modules["head"] = ("head.weight",)
    return modules


def put_packed(
    decoder: Decoder, name: str, weights: Sequence[PackedWeight], dtype: torch.dtype
) -> None:
    """Let a module that `packable` or `tables` name run from `weights`, given in its order.

    `dtype` is that of the hidden states, which begin with an embedding.
    """
    module = decoder.get_submodule(name)
    packed: nn.Module
    if isinstance(module, MLP):
        packed = PackedMLP(*weights)
    elif isinstance(module, Experts):
        packed = PackedExperts(module, *weights)
    elif isinstance(module, nn.Embedding):
        packed = PackedEmbedding(weights[0], dtype)
    else:
        packed = PackedLinear(*weights)
    decoder.set_submodule(name, packed)


def fill(name: str, plain: Tensor, weight: PackedWeight) -> None:
    """Give the plain weight `name` the values of its packed form."""
    with torch.no_grad():
        if _is_gated(name):
            plain.copy_(plain_order(name, unpack(weight)))
        else:
            unpack(weight, out=plain)


def packed_order(name: str, weight: Tensor) -> Tensor:
    """The plain weight `name`, [..., R, K], with its rows as they are packed.

    Rows of gate and up, else one half after the other, alternate: a kernel has both at hand.
    """
    if not _is_gated(name):
        return weight
    halves: Tensor = weight.unflatten(-2, (2, -1))
    return halves.transpose(-2, -3).flatten(-3, -2)


def plain_order(name: str, weight: Tensor) -> Tensor:
    """The inverse of `packed_order`; [..., R, anything]."""
    if not _is_gated(name):
        return weight
    pairs: Tensor = weight.unflatten(-2, (-1, 2))
    return pairs.transpose(-2, -3).flatten(-3, -2)


def _is_gated(name: str) -> bool:
    return name.removesuffix(".weight").endswith(".gate_up")


def _pack(name: str, weight: Tensor, format: Format, whole: bool = False) -> PackedWeight:
    own = packed_order(name, weight.detach())
    try:
        return pack_whole(own, format) if whole and format.bits == 4 else pack(own, format)
    except LayoutError as error:
        raise ConfigError(f"{name} cannot be stored as {format}: {error}") from error
