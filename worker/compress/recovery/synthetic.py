"""Text that teachers write themselves, to be taught on.

What teachers say of the text that they were trained on is in part what they know by heart, which a
student need not learn and small ones cannot. Of text that nobody has read they say what they
would of any other (Liu et al., "LLM-QAT: data-free quantization aware training",
arXiv:2305.17888). All sequences of a batch grow by one token at a time. What it gave up: paged
caches and sequences of different lengths, so that it is no way to serve.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError
from ...memory.device import free_memory
from ...model.config import ModelConfig
from ...model.decoder import Decoder
from ...weights import load_decoder
from .lessons import autocast

LEAD = 8
"""Tokens of real text that each sequence begins with: they tell its language and its kind."""
_MOST = 4096
"""Sequences at once; more are no faster."""
_SHARE = 1 / 4
"""Of the device's free memory, for keys and values."""


def write_text(
    folders: Sequence[Path],
    text: Tensor,
    count: int,
    seed: int,
    device: torch.device,
    told: Callable[[int, int], None] = lambda done, whole: None,
) -> Tensor:
    """int64 [count, L], sampled at temperature 1 from the checkpoints in `folders`, in turn.

    Each begins as one of `text`, int64 [n, L]. The same seed gives the same text on the same
    device. `told` is given the tokens done, and all. Raises ConfigError if L has no room for more
    than the lead.
    """
    length = text.shape[1]
    if length <= LEAD:
        raise ConfigError(f"sequences of {length} tokens leave none to write; give at least 9")
    draw = torch.Generator().manual_seed(seed)
    leads = text[torch.randint(len(text), (count,), generator=draw), :LEAD]
    shares = leads.tensor_split(len(folders))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    written: list[Tensor] = []
    for folder, share in zip(folders, shares, strict=True):
        config = ModelConfig.load(folder)
        writer = load_decoder(folder, config, device, dtype)
        rows = _rows(config, length, dtype, device)
        for part in share.split(rows):
            before = sum(len(own) for own in written) * length

            def step_told(tokens: int, before: int = before, rows: int = len(part)) -> None:
                told(before + tokens * rows, count * length)

            written.append(_continued(writer, part, length, seed + len(written), step_told))
    return torch.cat(written)


def _rows(config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> int:
    """Sequences whose keys and values there is room for."""
    numbers = sum(
        2 * layer.kv_heads * layer.head_dim
        for index, layer in enumerate(config.layers)
        if layer.kv_source == index
    )
    each = numbers * length * dtype.itemsize
    return max(1, min(_MOST, int(_SHARE * free_memory(device)) // each))


def _continued(
    decoder: Decoder, lead: Tensor, length: int, seed: int, told: Callable[[int], None]
) -> Tensor:
    """int64 [B, length] in host memory, each row `lead` [B, LEAD] and what `decoder` adds."""
    device = decoder.embedding.weight.device
    draw = torch.Generator(device).manual_seed(seed)
    text = torch.empty(len(lead), length, dtype=torch.int64, device=device)
    text[:, :LEAD] = lead.to(device)
    cache = _Lockstep(decoder.config, length)
    with torch.inference_mode(), autocast(device):
        for position in range(length - 1):
            positions = torch.full((len(lead),), position, device=device)
            hidden = decoder(text[:, position], positions, cache)
            cache.position += 1
            if position + 1 >= LEAD:
                chances = decoder.logits(hidden).softmax(-1)
                text[:, position + 1] = chances.multinomial(1, generator=draw)[:, 0]
            told(position + 2)
    return text.cpu()


class _Lockstep:
    """Attention of one new token in each sequence, all of them equally long; see `Attention`."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        self.position = 0
        self._layers, self._length = config.layers, length
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        source, window = self._layers[layer].kv_source, self._layers[layer].window
        if key is not None and value is not None:
            if source not in self._kept:
                count, heads, size = key.shape
                shape = count, heads, self._length, size
                self._kept[source] = key.new_empty(shape), value.new_empty(shape)
            for kept, own in zip(self._kept[source], (key, value), strict=True):
                kept[:, :, self.position] = own
        end = self.position + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        keys, values = (kept[:, :, seen] for kept in self._kept[source])
        mixed = F.scaled_dot_product_attention(
            query[:, :, None], keys, values, scale=1.0, enable_gqa=True
        )
        return mixed[:, :, 0]
