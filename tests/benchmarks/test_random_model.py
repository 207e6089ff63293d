"""Random decoders of the offload benchmark: equal each time, streamed or not."""

from typing import Any

import pytest
import torch

from benchmarks.random_model import RandomModel
from conclave.kernels.formats import Format
from conclave.worker.memory.residency import choose, least
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.memory.streaming.layers import LayerStream
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.storage import storage_of
from conclave.worker.weights import blank_decoder

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1},
    **{"head_dim": 32, "global_head_dim": 64},
}
FEW = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}


@pytest.mark.parametrize(
    ("name", "format"), [("31b", None), ("31b", "5:16-int4-g64"), ("26b", "dense-int4-g64")]
)
def test_decoders_are_equal(name: str, format: str | None) -> None:
    settings = shape_settings(name, 6) | TINY | (FEW if name == "26b" else {})
    source = RandomModel(
        ModelConfig.parse(settings), None if format is None else Format.parse(format), CPU
    )
    wanted = logits(source.decoder())
    assert wanted.isfinite().all() and wanted.std() > 0.1
    storage = storage_of(
        blank_decoder(source.config), source.formats(), torch.bfloat16, packed=True
    )
    blocks = [layer.block for layer in storage.layers]
    residency = choose(blocks, least(blocks, 2), 2)
    assert residency is not None
    source.forget()
    streamed = source.decoder(LayerStream(residency, CPU, prefetch=True, poison=True))
    assert torch.equal(logits(streamed), wanted) and torch.equal(logits(streamed), wanted)


@torch.inference_mode()
def logits(decoder: Decoder) -> torch.Tensor:
    tokens = torch.arange(9)
    return decoder.logits(decoder(tokens, tokens, DenseAttention(decoder.config, [9])))
