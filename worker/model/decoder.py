"""The Gemma 4 text decoder of every size, and the attention that needs no cache.

`Decoder` maps flat tokens to hidden states and those to logits. Who remembers keys is its caller's
choice: the worker's paged cache (worker/running/runner.py), or `DenseAttention` here, for whole
sequences and for training. What it gave up: prompt tokens whose logits nobody wants could skip the
layers after the last own keys (20 of 35 in E2B).
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig
from .layers import Attention, DecoderLayer, Rotations
from .norms import RMSNorm

__all__ = ["Attention", "Decoder", "DenseAttention"]


class Decoder(nn.Module):
    """Gemma 4 without its image and audio towers.

    weights.py builds it without storage (`torch.device("meta")`) and fills it. A step's tokens lie
    flat, several sequences end to end without padding; only the `Attention` knows where each ends.
    """

    embedding_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embedding = Embedding(config.vocab_size, size)
        scale = torch.tensor(size**0.5, device="cpu")
        self.register_buffer("embedding_scale", scale, persistent=False)
        self.per_layer = PerLayerEmbedding(config) if config.per_layer_input_size else None
        self.rotations = Rotations(config)
        self.layers = nn.ModuleList(
            DecoderLayer(index, layer, config) for index, layer in enumerate(config.layers)
        )
        self.norm = RMSNorm(size, config.norm_epsilon)
        self.head = None if config.tied_head else nn.Linear(size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Hidden states after the final norm [T, hidden], of int64 `tokens` and `positions` [T]."""
        hidden = self.embedding(tokens)
        # Rounded to the weights' dtype as in transformers: 53.066 becomes 53.0 in bfloat16.
        hidden = hidden * self.embedding_scale.to(hidden.dtype)
        per_layer: Sequence[Tensor | None] = [None] * len(self.layers)
        if self.per_layer is not None:
            per_layer = self.per_layer(tokens, hidden)
        rotations = self.rotations(positions)
        for layer, rotation, addition in zip(self.layers, rotations, per_layer, strict=True):
            hidden = layer(hidden, rotation, addition, attention)
        normed: Tensor = self.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits, float32 [N, vocab], of `forward`'s rows [N, hidden]."""
        scores = self.embedding.scores(hidden) if self.head is None else self.head(hidden)
        logits: Tensor = scores.float()
        cap = self.config.logit_softcap
        return logits if cap is None else (logits / cap).tanh_() * cap


class Embedding(nn.Embedding):
    """A vector for each token, which may be the head as well."""

    def scores(self, hidden: Tensor) -> Tensor:
        """[N, hidden] times each token's vector, [N, vocab]."""
        return F.linear(hidden, self.weight)


class PerLayerEmbedding(nn.Module):
    """A second embedding with a share for every layer, mixed with a projection of the first."""

    scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size = config.per_layer_input_size
        width = self.size * len(config.layers)
        self.embedding = nn.Embedding(config.per_layer_vocab_size, width)
        self.projection = nn.Linear(config.hidden_size, width, bias=False)
        self.norm = RMSNorm(self.size, config.norm_epsilon)
        scale = torch.tensor(self.size**0.5, device="cpu")
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, tokens: Tensor, embedded: Tensor) -> tuple[Tensor, ...]:
        """For each layer [T, size], of tokens [T] and their scaled embeddings [T, hidden]."""
        projected = self.projection(embedded) * embedded.shape[-1] ** -0.5
        context = self.norm(projected.unflatten(-1, (-1, self.size)))
        scaled = self.embedding(tokens) * self.scale.to(embedded.dtype)
        identity = scaled.unflatten(-1, (-1, self.size))
        mixed: Tensor = (context + identity) * 2**-0.5
        return mixed.unbind(1)


class DenseAttention:
    """Attention over sequences that lie whole in the call: full forward, training, tests.

    `lengths` are those of the sequences; neighbours of equal length run as one batch. Keys and
    values are kept for the layers that read them: make a new one for every call. Differentiable.
    """

    def __init__(self, config: ModelConfig, lengths: Sequence[int]) -> None:
        self.layers = config.layers
        self.runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        sources = enumerate(layer.kv_source for layer in config.layers)
        self.read_later = {source for layer, source in sources if source != layer}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """See `Attention`."""
        if key is None or value is None:
            key, value = self.kept[self.layers[layer].kv_source]
        elif layer in self.read_later:
            self.kept[layer] = (key, value)
        window = self.layers[layer].window
        outputs = []
        begin = 0
        for length, count in self.runs:
            rows = slice(begin, begin + length * count)
            parts = (part[rows].unflatten(0, (count, length)) for part in (query, key, value))
            queries, keys, values = (part.transpose(1, 2) for part in parts)
            mask = self.mask(length, window, query.device)
            if query.is_cuda:  # shared heads with a mask, or of 512, have no fast kernel in torch
                each = queries.shape[1] // keys.shape[1]
                keys, values = (part.repeat_interleave(each, 1) for part in (keys, values))
            mixed = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=1.0,
                enable_gqa=True,
            )
            outputs.append(mixed.transpose(1, 2).flatten(0, 1))
            begin = rows.stop
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def mask(self, length: int, window: int | None, device: torch.device) -> Tensor | None:
        """Bool [length, length]: keys (columns) that a query (row) sees; None for all before it."""
        if window is None or window >= length:
            return None
        if (length, window) not in self.masks:
            seen = torch.ones(length, length, dtype=torch.bool, device=device)
            self.masks[length, window] = seen.tril().triu(1 - window)
        return self.masks[length, window]
