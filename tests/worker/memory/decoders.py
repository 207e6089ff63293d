"""What tests of weights that do not stay share: sizes of a decoder, a tiny one, its numbers."""

from pathlib import Path

import torch
from torch import Tensor

from conclave.kernels.formats import Format
from conclave.worker.memory.residency import choose, choose_coded
from conclave.worker.memory.streaming.coded import stream_of
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.packed import pack_decoder, packable
from conclave.worker.model.storage import Storage, storage_of
from conclave.worker.weights import blank_decoder, load_decoder

CPU = torch.device("cpu")


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


class Streamed:
    """A tiny model whose layers have room for so many bytes; None lets all stay."""

    def __init__(
        self,
        folder: Path,
        format: Format | None = None,
        ahead: int = 2,
        room: int | None = None,
        dtype: torch.dtype = torch.float32,
        coded: bool = False,
    ) -> None:
        config = ModelConfig.load(folder)
        self.storage = storage(config, format, dtype)
        blocks = [layer.block for layer in self.storage.layers]
        room = sum(blocks) if room is None else room
        if coded:
            codes = [layer.coded_modules for layer in self.storage.layers]
            residency = choose_coded(blocks, codes, self.storage.largest_module, room, ahead)
        else:
            residency = choose(blocks, room, ahead)
        assert residency is not None
        self.stream = stream_of(residency, CPU, prefetch=ahead > 0, poison=True)

        def settle(decoder: Decoder, layer: int) -> None:
            if format is not None:
                pack_decoder(decoder, format, layer)
            self.stream.take(decoder, layer)

        self.decoder = load_decoder(folder, config, CPU, dtype, settle=settle)
        if residency.streamed or residency.working:
            self.stream.start(self.decoder)

    def logits(self, length: int) -> torch.Tensor:
        """float32 [length, vocab], of some tokens."""
        return logits_of(self.decoder, torch.arange(5, 5 + length), length)
