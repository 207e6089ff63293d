"""Experts in slots on a GPU: bit for bit as resident ones, eagerly and as a CUDA graph.

A slot is filled with NaN before another expert comes: products that ran before their experts had
come, or an expert that came before a layer had run, would show.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_model import RandomModel
from conclave.kernels.formats import Format
from conclave.kernels.residence import reference
from conclave.kernels.residence.table import SlotTable
from conclave.worker import Engine, Knobs
from conclave.worker.compress.interchange.exporter import export_checkpoint
from conclave.worker.memory.experts.cache import ExpertCache
from conclave.worker.memory.experts.slots import ExpertSlots, fewest_slots
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.storage import storage_of
from conclave.worker.weights import blank_decoder

from ..worker.memory.decoders import logits_of, some_tokens
from ..worker.memory.test_streaming_engine import beside_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODELS = Path(__file__).parents[2] / "examples" / "models"
GPU = torch.device("cuda")
SMALL = {
    **{"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 1024},
    **{"num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 512},
}
FORMATS = ["dense-int4-g64", "5:16-int4-g128", "dense-int8-g64"]
STEPS = 6


def model(format: str | None) -> RandomModel:
    config = ModelConfig.parse(shape_settings("26b", 6) | SMALL)
    return RandomModel(config, None if format is None else Format.parse(format), GPU)


def slotted(source: RandomModel, count: int, predict: bool) -> tuple[Decoder, ExpertCache]:
    blank = blank_decoder(source.config)
    storage = storage_of(blank, source.formats(), torch.bfloat16, packed=True)
    least = fewest_slots(storage.layers)
    assert least is not None
    slots = ExpertSlots(least.layers, least.experts, count, least.parts)
    cache = ExpertCache(slots, GPU, predict, poison=True)
    return source.decoder(cache), cache


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_tokens_are_those_of_resident_experts(format: str | None) -> None:
    """Each token's own product, products by expert on tensor cores, and more than one part."""
    source = model(format)
    resident = source.decoder()
    asked = [(1, seed) for seed in range(STEPS)] + [(3, 7), (40, 8), (1, 9), (600, 10), (1, 11)]
    wanted = [logits_of(resident, some_tokens(2 * length, seed), length) for length, seed in asked]
    for count, predict in ((16, True), (40, False), (40, True), (96, True)):
        decoder, cache = slotted(source, count, predict)
        for _ in range(2):
            for (length, seed), expected in zip(asked, wanted, strict=True):
                answer = logits_of(decoder, some_tokens(2 * length, seed), length)
                assert expected.isfinite().all()
                assert torch.equal(answer, expected), (count, predict, length)
        use = cache.use()
        assert use.misses > 0 and use.hits > 0 and (use.foreseen > 0 or not predict or count == 16)
        held = cache.table.owner[cache.table.owner >= 0].long()
        assert len(held.unique()) == len(held)
        places = torch.arange(len(cache.table.owner), device="cuda")[cache.table.owner >= 0]
        assert torch.equal(cache.table.slot_of[held].long(), places)
        cache.close()


@pytest.mark.parametrize("format", FORMATS[:2])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_recorded_step_fetches_too(format: str, batch: int) -> None:
    source = model(format)
    resident = source.decoder()
    wanted = [logits_of(resident, some_tokens(batch, seed), 1) for seed in range(20)]
    for count, predict in ((16, True), (30, False), (30, True)):
        decoder, cache = slotted(source, count, predict)
        tokens = some_tokens(batch, 0)
        for _ in range(2):
            logits_of(decoder, tokens, 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = logits_of(decoder, tokens, 1)
        before = cache.use()
        for seed in range(20):
            tokens.copy_(some_tokens(batch, seed))
            cache.before_replay()
            graph.replay()
            assert torch.equal(logits, wanted[seed]), (count, predict, seed)
            if seed == 7:  # eager steps may come between
                assert torch.equal(logits_of(decoder, some_tokens(batch, 3), 1), wanted[3])
        use = cache.use()
        assert use.misses > before.misses
        assert use.misses + use.hits - before.misses - before.hits >= 21 * 6 * 4
        cache.close()


def test_a_card_decides_as_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of a real step, with none foreseen: the same experts in the same slots."""
    decoder, cache = slotted(model(FORMATS[0]), 30, predict=False)
    plain = SlotTable.empty(6, 16, 30, torch.device("cpu"))
    begin = cache.begin

    def told(place: int, chosen: torch.Tensor, *more: Any) -> None:
        reference.claim(plain, place, chosen.cpu())
        begin(place, chosen, *more)

    monkeypatch.setattr(cache, "begin", told)
    for seed in range(12):
        logits_of(decoder, some_tokens(1 + seed % 4 * 9, seed), 1)
    for name in ("slot_of", "owner", "used", "worth", "clock", "counts"):
        assert torch.equal(getattr(cache.table, name).cpu(), getattr(plain, name)), name
    cache.close()


def answers(engine: Engine) -> list[tuple[int, ...]]:
    greedy: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    streams = [engine.stream([5 + n] * (30 + 50 * n), **greedy) for n in range(4)]
    return [tuple(stream.result().token_ids) for stream in streams]


@pytest.mark.parametrize("weight_bits", [None, 4])
def test_an_engine_keeps_to_its_budget(weight_bits: int | None, tmp_path: Path) -> None:
    few: dict[str, Any] = {
        **{"device": "cuda", "max_sequences": 4, "max_step_tokens": 64, "max_context": 512},
        "prefix_cache": False,
    }
    folder = tmp_path / "plain"  # in bfloat16, as no shipped model is
    export_checkpoint(MODELS / "debian-moe-8m", folder, "dense")
    knobs = Knobs(weight_bits=weight_bits, memory_budget=1)
    with Engine(folder, knobs=knobs, **few) as resident:
        wanted = answers(resident)
        assert resident.load.experts is None
        layers, fixed = resident.model.storage.layers, beside_layers(resident)
    del resident
    torch.cuda.empty_cache()
    least = fewest_slots(layers)
    assert least is not None
    fixed += sum(layer.block - layer.expert_block for layer in layers)
    for count in (9, 24):
        budget = (fixed + count * least.expert_bytes + 64) / 2**30
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        knobs = Knobs(weight_bits=weight_bits, memory_budget=budget)
        with Engine(folder, knobs=knobs, **few) as engine:
            for _ in range(2):
                assert answers(engine) == wanted
            experts = engine.model.runner.experts
            assert experts is not None and experts.slots.slots >= 8
            use = experts.use()
            assert use.misses > 0 and use.foreseen >= use.foreseen_used
            assert torch.cuda.max_memory_allocated() - before < budget * 2**30
