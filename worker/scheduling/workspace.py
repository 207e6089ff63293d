"""What one step takes beside weights and cache: an upper bound by shapes, made for a budget.

The worst step fills `max_step_tokens`, with `max_sequences` at `max_context`. What an allocator
cannot give back because it is in pieces is not in it, nor what the device's driver takes.
"""

from ...kernels.attention import wide_scratch
from ..config import EngineConfig
from ..model.config import LayerConfig, ModelConfig, cache_groups

_LOGIT_BYTES = 20
"""Of a scored token for each word: logits, log-probabilities, and their comparison with the
token's own (17 measured)."""
_DRAW_BYTES = 64
"""The same of a drawn token: logits, sorted values and ids, probabilities, sums (50 measured)."""
_RECORDED_BYTES = 14
"""The same of a recorded step's row: the head's result, and three float32 of its cap."""
MOST_RECORDINGS = 32
"""Decode steps that are kept as CUDA graphs."""
_GRAPH_BYTES = 1 << 16
"""Of one of them for each layer, which the driver keeps (2 to 4 MiB for 60 layers, an H100)."""


def workspace(
    config: EngineConfig, model: ModelConfig, context: int, dtype_size: int, expanded: int
) -> int:
    """Bytes of the worst step.

    Args:
        config: says how much runs in one.
        model: its shape.
        context: the longest, in tokens.
        dtype_size: bytes of one number of the model's dtype.
        expanded: bytes of scratch memory for a weight written out dense.
    """
    tokens, rows = config.max_step_tokens, rows_of(config)
    through = tokens * max(_layer(model, layer, dtype_size) for layer in model.layers)
    attention = max(_attention(layer, tokens, rows, context, dtype_size) for layer in model.layers)
    masks = 3 * dtype_size * max(tokens, rows) * context
    words = max(_LOGIT_BYTES * tokens, _DRAW_BYTES * rows) * model.vocab_size
    additions = _additions(model, tokens, dtype_size)
    # Layers, then the head: what one has taken is free for the other.
    return expanded + additions + masks + max(through + attention, words)


def rows_of(config: EngineConfig) -> int:
    """Sequences in one step, at most."""
    return min(config.max_sequences, config.max_step_tokens)


def recordings(config: EngineConfig, model: ModelConfig, context: int, dtype_size: int) -> int:
    """Bytes of decode steps as CUDA graphs: the pool that they work in, inputs, logits, graphs."""
    rows = rows_of(config)
    through = rows * max(_layer(model, layer, dtype_size) for layer in model.layers)
    words, groups = rows * model.vocab_size, len(cache_groups(model))
    # Tokens, positions and limits; slots, offsets and a table in each group.
    inputs = (rows + 1) * (3 + groups * (2 + -(-context // config.block_size)))
    graphs = MOST_RECORDINGS * _GRAPH_BYTES * len(model.layers)
    additions = _additions(model, rows, dtype_size)
    return 4 * words + 8 * inputs + graphs + additions + max(through, _RECORDED_BYTES * words)


def _additions(model: ModelConfig, tokens: int, dtype_size: int) -> int:
    """Of inputs that each layer has of its own, while they are made."""
    return 4 * tokens * len(model.layers) * model.per_layer_input_size * dtype_size


def _layer(model: ModelConfig, layer: LayerConfig, dtype_size: int) -> int:
    """Of one token in one layer: residuals and norms, in part as float32; queries, keys, values
    before and after their rotation; gate, up and their product."""
    heads = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
    inner = 4 * layer.intermediate_size
    if layer.experts is not None:
        each = 4 * layer.experts.intermediate_size + 3 * model.hidden_size
        inner += layer.experts.active * each
    return (8 * model.hidden_size + 4 * heads + inner) * dtype_size + 8 * model.hidden_size


def _attention(layer: LayerConfig, tokens: int, rows: int, context: int, dtype_size: int) -> int:
    """Of one layer: copies of the keys and values that are read. Decoding rows are padded to the
    longest; a prompt's chunk has all its heads' keys, and scores or what a kernel keeps instead."""
    most = context if layer.window is None else min(context, layer.window + tokens)
    seen = context if layer.window is None else min(context, layer.window)
    decoding = rows * seen * 2 * layer.kv_heads * layer.head_dim * dtype_size
    copied = most * 2 * (layer.heads + layer.kv_heads) * layer.head_dim * dtype_size
    scores = 2 * layer.heads * tokens * most * 4
    scratch = 0
    if (layer.head_dim, dtype_size) == (wide_scratch.DIM, 2) and tokens >= wide_scratch.FEW:
        # Where that kernel runs (if the device is Hopper's, which nobody says here) are no scores.
        scratch = wide_scratch.Scratch.of(tokens, layer.heads, seen).bytes
    return max(decoding, copied + max(scores, scratch))
