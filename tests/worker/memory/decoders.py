"""What tests of weights that do not stay share: sizes of a decoder, and its numbers."""

import torch
from torch import Tensor

from conclave.kernels.formats import Format
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.packed import packable
from conclave.worker.model.storage import Storage, storage_of
from conclave.worker.weights import blank_decoder


def storage(config: ModelConfig, format: Format | None, dtype: torch.dtype) -> Storage:
    """Of a decoder whose large weights are all in one format."""
    blank = blank_decoder(config)
    names = [name for names in packable(blank).values() for name in names]
    formats = {} if format is None else dict.fromkeys(names, format)
    return storage_of(blank, formats, dtype, packed=True)


@torch.inference_mode()
def logits_of(decoder: Decoder, tokens: Tensor, length: int) -> Tensor:
    """float [tokens, vocab] of sequences of one length, one behind the other in `tokens`."""
    positions = torch.arange(len(tokens), device=tokens.device) % length
    attention = DenseAttention(decoder.config, [length] * (len(tokens) // length))
    return decoder.logits(decoder(tokens, positions, attention))


def some_tokens(count: int, seed: int, device: str = "cuda") -> Tensor:
    """int64 [count], below 1,024."""
    draw = torch.Generator(device).manual_seed(seed)
    return torch.randint(1024, (count,), generator=draw, device=device)
