"""The parts of a Gemma 4 decoder: rope, attention, dense MLP, experts, layer.

The arithmetic is that of transformers' modeling_gemma4.py, to 1e-4 in float32. Projections of the
same input are one matrix (qkv, gate_up), because at one token a step every torch call costs its 3
to 10 us. Tokens are flat, [T, ...] everywhere; nothing here knows batches, pages or masks: keys and
values go to an `Attention`. What it gave up: a fused kernel for gelu with its product.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.experts.ops import choose, combine, dispatch
from ...kernels.heads import DIMS, DTYPES, norm_heads
from ...kernels.norm import normed_sum
from .config import ExpertsConfig, LayerConfig, ModelConfig, RopeConfig
from .norms import RMSNorm, by_kernel, joined, rms_norm

_FEW = 16
"""Experts that compiled training may run for all tokens."""


class Attention(Protocol):
    """Who holds the keys: called once by each layer, in order."""

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """Softmax(query keys) values over what the tokens may see, with scale 1.

        `query` [T, heads, head_dim]; `key` and `value` [T, kv_heads, head_dim], or None in a layer
        that reads the keys of its `kv_source`. Returns [T, heads, head_dim].
        """
        ...


class Rotations(nn.Module):
    """The rope tables of one step for every kind of layer, computed together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kinds = list(dict.fromkeys((layer.head_dim, layer.rope) for layer in config.layers))
        self.kind_of_layer = [kinds.index((layer.head_dim, layer.rope)) for layer in config.layers]
        self.sizes = [head_dim for head_dim, _ in kinds]
        halves = [rope_frequencies(head_dim, rope) for head_dim, rope in kinds]
        # cos is even and sin odd: with the first half negative, one cos and one sin of the whole
        # row give (cos, cos) and (-sin, sin), the two factors that rotating by halves needs.
        signed = torch.cat([part for half in halves for part in (-half, half)])
        # No buffer, because module.to(bfloat16) must not round frequencies.
        self.frequencies = {signed.device: signed}

    def forward(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each layer (cos, signed sin), float32 [T, 1, head_dim], of int64 positions [T]."""
        device = positions.device
        if device not in self.frequencies:
            self.frequencies[device] = next(iter(self.frequencies.values())).to(device)
        angles = (positions[:, None] * self.frequencies[device])[:, None]
        cosines, sines = angles.cos().split(self.sizes, -1), angles.sin().split(self.sizes, -1)
        return [(cosines[kind], sines[kind]) for kind in self.kind_of_layer]


def rope_frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """Angle of each pair at position 1, float32 [head_dim / 2].

    In torch's float32 pow as in transformers: at position 100,000 another rounding would show.
    """
    exponents = torch.arange(0, 2 * rope.pairs, 2, dtype=torch.float32, device="cpu") / head_dim
    turning = 1.0 / (rope.theta**exponents) / rope.factor
    return F.pad(turning, (0, head_dim // 2 - rope.pairs))


def rotate(values: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns pairs (i, i + head_dim / 2) of [T, heads, head_dim] by the tables of `Rotations`."""
    cosine, signed_sine = rotation
    return torch.addcmul(values * cosine, values.roll(values.shape[-1] // 2, -1), signed_sine)


_Heads = tuple[Tensor, Tensor | None, Tensor | None]
"""Queries, keys and values; a layer that reads another's has none of the latter."""


class SelfAttention(nn.Module):
    """Projections, head norms and rope around an `Attention`.

    `qkv` holds the rows of q, then k, then v; v is missing where the values are the raw keys, k and
    v where another layer's are read. `head_norms` holds q_norm, then k_norm.
    """

    head_norm_rows: Tensor

    def __init__(self, index: int, layer: LayerConfig, config: ModelConfig) -> None:
        super().__init__()
        self.index = index
        self.heads = layer.heads
        self.kv_heads = layer.kv_heads
        self.head_dim = layer.head_dim
        self.owns_keys = layer.kv_source == index
        self.epsilon = config.norm_epsilon
        self.projected = layer.heads
        if self.owns_keys:
            self.projected += layer.kv_heads * (2 if layer.has_value_projection else 1)
        self.qkv = nn.Linear(config.hidden_size, self.projected * layer.head_dim, bias=False)
        self.head_norms = nn.Parameter(torch.ones((2 if self.owns_keys else 1) * layer.head_dim))
        self.out = nn.Linear(layer.heads * layer.head_dim, config.hidden_size, bias=False)
        rows = [0] * layer.heads + [1] * (layer.kv_heads if self.owns_keys else 0)
        self.register_buffer("head_norm_rows", torch.tensor(rows, device="cpu"), persistent=False)

    def forward(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention
    ) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        projected = self.qkv(hidden).view(-1, self.projected, self.head_dim)
        make = self._by_kernel if self._fits_kernel(projected) else self._by_torch
        mixed: Tensor = attention.attend(self.index, *make(projected, rotation))
        output: Tensor = self.out(mixed.flatten(1))
        return output

    def _fits_kernel(self, projected: Tensor) -> bool:
        """Whether one kernel does what follows a projection. It cannot be differentiated."""
        same = projected.dtype == self.head_norms.dtype
        usual = projected.dtype in DTYPES and self.head_dim in DIMS
        recorded = projected.requires_grad or torch.compiler.is_compiling()
        return projected.is_cuda and same and usual and not recorded

    def _by_kernel(self, projected: Tensor, rotation: tuple[Tensor, Tensor]) -> _Heads:
        """As `_by_torch`."""
        kv_heads = self.kv_heads if self.owns_keys else 0
        query, key, value = norm_heads(
            projected, self.head_norms, rotation, self.heads, kv_heads, self.epsilon
        )
        return (query, key, value) if self.owns_keys else (query, None, None)

    def _by_torch(self, projected: Tensor, rotation: tuple[Tensor, Tensor]) -> _Heads:
        """Queries, keys and values of a projection, [T, projected, head_dim]."""
        # float32 from projection to cache: norm, weight and rope round once, not four times.
        normed = rms_norm(projected.float(), None, self.epsilon)
        weights = self.head_norms.view(-1, self.head_dim).index_select(0, self.head_norm_rows)
        turned = rotate(normed[:, : len(weights)] * weights, rotation).to(projected.dtype)
        if not self.owns_keys:
            return turned, None, None
        # The values' norm has no weight, so where they have no projection of their own they are
        # the normed raw keys; either way they are the last heads.
        value = normed[:, -self.kv_heads :].to(projected.dtype)
        return turned[:, : self.heads], turned[:, self.heads :], value


class MLP(nn.Module):
    """down(gelu(gate) * up); `gate_up` holds the rows of gate, then up."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, -1)
        output: Tensor = self.down(F.gelu(gate, approximate="tanh") * up)
        return output


class Experts(nn.Module):
    """Router and experts: each token's `active` best, weighted.

    Tokens are sorted by expert so that each expert hit runs once on its own slice. On a GPU the
    counts cost one synchronisation a layer.
    """

    def __init__(self, experts: ExpertsConfig, config: ModelConfig) -> None:
        super().__init__()
        self.active = experts.active
        self.count = experts.count
        self.epsilon = config.norm_epsilon
        hidden, inner = config.hidden_size, experts.intermediate_size
        self.router = nn.Linear(hidden, experts.count, bias=False)
        self.router_scale = nn.Parameter(torch.ones(hidden))
        self.expert_scale = nn.Parameter(torch.ones(experts.count))
        self.gate_up = nn.Parameter(torch.empty(experts.count, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts.count, hidden, inner))

    def route(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Expert weights (float32) and indices, both [T, active], from the un-normed residual."""
        return choose(self.scores(residual), self.expert_scale, self.active)

    def scores(self, residual: Tensor) -> Tensor:
        """The router's, [T, count]: the likeliest expert has the highest."""
        scaled = rms_norm(residual, self.router_scale, self.epsilon) * residual.shape[-1] ** -0.5
        scores: Tensor = self.router(scaled)
        return scores

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Experts of `hidden`, chosen by `residual`; all [T, hidden]."""
        weights, chosen = self.route(residual)
        if torch.compiler.is_compiling() and len(self.gate_up) <= _FEW:
            return self._all(hidden, weights, chosen)
        inputs, own, back = dispatch(hidden, chosen)
        return combine(self.run(inputs, own), weights, back)

    def _all(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`forward` by all experts, most weighing zero: lengths that change are not compiled."""
        shares = torch.zeros(len(hidden), len(self.gate_up), device=hidden.device)
        shares = shares.scatter(1, chosen, weights).to(hidden.dtype)
        both = F.linear(hidden, self.gate_up.flatten(0, 1)).unflatten(-1, (len(self.gate_up), -1))
        gate, up = both.chunk(2, -1)
        inner = F.gelu(gate, approximate="tanh") * up * shares[..., None]
        output: Tensor = F.linear(inner.flatten(1), self.down.transpose(0, 1).flatten(1))
        return output

    def run(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """Each of `inputs` [n, hidden] by its expert, `chosen` int32 [n] in ascending order."""
        counts = chosen.bincount(minlength=self.count).tolist()
        outputs = []
        for index, own in enumerate(inputs.split(counts)):
            if len(own):
                gate_up, down = self.expert(index)
                gate, up = F.linear(own, gate_up).chunk(2, -1)
                inner = F.gelu(gate, approximate="tanh") * up
                outputs.append(F.linear(inner, down))
        return torch.cat(outputs)

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """One expert's weights: gate and up [2 * inner, hidden], down [hidden, inner]."""
        return self.gate_up[index], self.down[index]


class FeedForward(nn.Module):
    """The dense MLP and, where the model has experts, their branch beside it, with their norms."""

    def __init__(self, layer: LayerConfig, config: ModelConfig) -> None:
        super().__init__()
        size, epsilon = config.hidden_size, config.norm_epsilon
        self.norm = RMSNorm(size, epsilon)
        self.mlp = MLP(size, layer.intermediate_size)
        self.experts: Experts | None = None
        if layer.experts is not None:
            self.experts = Experts(layer.experts, config)
            self.mlp_output_norm = RMSNorm(size, epsilon)
            self.experts_input_norm = RMSNorm(size, epsilon)
            self.experts_output_norm = RMSNorm(size, epsilon)

    @property
    def input_norms(self) -> list[RMSNorm]:
        """Of the residual: the MLP's, and the experts' if there are any."""
        return [self.norm] if self.experts is None else [self.norm, self.experts_input_norm]

    def forward(self, residual: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """[T, hidden] to [T, hidden]; the residual itself is not added.

        `inputs` are what `input_norms` make of it.
        """
        dense: Tensor = self.mlp(inputs[0])
        if self.experts is None:
            return dense
        sparse: Tensor = self.experts(inputs[1], residual)
        own, other = self.mlp_output_norm, self.experts_output_norm
        if by_kernel(dense, own.weight) and by_kernel(sparse, other.weight):
            branches = [(dense, own.weight), (sparse, other.weight)]
            return normed_sum(branches, epsilon=own.epsilon)[0]
        output: Tensor = own(dense) + other(sparse)
        return output


class PerLayerInput(nn.Module):
    """What the token's per-layer embedding adds to the residual at the end of a layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.per_layer_input_size, bias=False)
        self.out = nn.Linear(config.per_layer_input_size, config.hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)

    def forward(self, hidden: Tensor, per_layer: Tensor) -> Tensor:
        """Of `hidden` [T, hidden] and this layer's `per_layer` [T, per_layer_input_size], which its
        caller norms."""
        gate = F.gelu(self.gate(hidden), approximate="tanh")
        output: Tensor = self.out(gate * per_layer)
        return output


class DecoderLayer(nn.Module):
    """Attention, feed-forward and per-layer input, each normed before it joins the residual."""

    scalar: Tensor

    def __init__(self, index: int, layer: LayerConfig, config: ModelConfig) -> None:
        super().__init__()
        size, epsilon = config.hidden_size, config.norm_epsilon
        self.attention_norm = RMSNorm(size, epsilon)
        self.attention = SelfAttention(index, layer, config)
        self.attention_output_norm = RMSNorm(size, epsilon)
        self.feed_forward = FeedForward(layer, config)
        self.feed_forward_output_norm = RMSNorm(size, epsilon)
        self.per_layer_input = PerLayerInput(config) if config.per_layer_input_size else None
        self.register_buffer("scalar", torch.ones(1))

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        per_layer: Tensor | None,
        attention: Attention,
    ) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        mixed = self.attention(self.attention_norm(hidden), rotation, attention)
        following = self.feed_forward.input_norms
        hidden, *inputs = joined(hidden, mixed, self.attention_output_norm, following=following)
        added, own = self.feed_forward(hidden, inputs), self.feed_forward_output_norm
        if self.per_layer_input is not None:
            (hidden,) = joined(hidden, added, own)
            added, own = self.per_layer_input(hidden, per_layer), self.per_layer_input.norm
        return joined(hidden, added, own, self.scalar)[0]
