"""Streamed layers on a GPU: bit for bit as resident ones, eagerly and as a CUDA graph.

Slots that are given back are filled with NaN: a layer that ran before its weights had come, or a
copy that came before a layer had run, would show; so would one that was decoded too early. Layers
are so large that their copies take longer than they run.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_model import RandomModel
from conclave.kernels.formats import Format
from conclave.worker import Engine, Knobs
from conclave.worker.errors import ConfigError
from conclave.worker.memory.host import HostBlock
from conclave.worker.memory.residency import choose, choose_coded, least, least_coded
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.memory.streaming.coded import CodedStream, stream_of
from conclave.worker.memory.streaming.layers import LayerStream
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.packed import large_modules
from conclave.worker.model.storage import storage_of
from conclave.worker.weights import blank_decoder

from ..worker.memory.decoders import logits_of, some_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODELS = Path(__file__).parents[2] / "examples" / "models"
BATCH, STEPS = 2, 4
SMALL = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 1024}
EXPERTS = SMALL | {"num_experts": 16, "moe_intermediate_size": 512, "intermediate_size": 1024}


def model(name: str, format: str | None) -> RandomModel:
    settings = shape_settings(name, 8) | (SMALL if name == "31b" else EXPERTS)
    config = ModelConfig.parse(settings)
    own = None if format is None else Format.parse(format)
    return RandomModel(config, own, torch.device("cuda"))


def streamed(
    source: RandomModel, ahead: int, share: float, coded: bool
) -> tuple[Decoder, LayerStream]:
    """With room for a share of what lies between the least and all layers."""
    blank = blank_decoder(source.config)
    storage = storage_of(blank, source.formats(), torch.bfloat16, packed=True)
    blocks = [layer.block for layer in storage.layers]
    codes = [layer.coded_modules for layer in storage.layers]
    if coded:
        low = least_coded(codes, storage.largest_module, ahead)
        high = storage.largest_module + sum(map(sum, codes)) - 1
        room = low + int(share * (high - low))
        residency = choose_coded(blocks, codes, storage.largest_module, room, ahead)
    else:
        low = least(blocks, ahead)
        residency = choose(blocks, low + int(share * (sum(blocks) - 1 - low)), ahead)
    assert residency is not None and residency.streamed
    stream = stream_of(residency, torch.device("cuda"), prefetch=ahead > 0, poison=True)
    assert isinstance(stream, CodedStream) == coded
    return source.decoder(stream), stream


CODED = [
    ("31b", None, True),
    ("31b", "5:16-int4-g128", True),
    ("31b", "8:16-int8-g64", True),
]
CASES = [
    ("31b", "dense-int4-g64", False),
    ("31b", "5:16-int4-g128", False),
    ("26b", "dense-int4-g64", False),
    *CODED,
]


@pytest.mark.parametrize(
    ("name", "format", "coded"), [("31b", None, False), *CASES, ("26b", "5:16-int4-g64", True)]
)
def test_tokens_are_those_of_resident_layers(name: str, format: str | None, coded: bool) -> None:
    source = model(name, format)
    resident = source.decoder()
    wanted = {
        (length, seed): logits_of(resident, some_tokens(2 * length, seed), length)
        for length in (1, 40)
        for seed in range(STEPS)
    }
    for ahead, share in ((0, 0.0), (1, 0.0), (2, 0.0), (2, 0.5), (2, 1.0), (3, 0.0)):
        decoder, stream = streamed(source, ahead, share, coded)
        outputs = {
            key: logits_of(decoder, some_tokens(2 * key[0], key[1]), key[0]) for key in wanted
        }
        for key, expected in wanted.items():
            assert expected.isfinite().all() and torch.equal(outputs[key], expected), (ahead, key)
        use = stream.use()
        assert use.copied_bytes >= len(wanted) * use.host_bytes
        stream.close()


@pytest.mark.parametrize(("name", "format", "coded"), CASES)
def test_a_recorded_step_copies_too(name: str, format: str | None, coded: bool) -> None:
    source = model(name, format)
    resident = source.decoder()
    wanted = [logits_of(resident, some_tokens(BATCH, seed), 1) for seed in range(STEPS)]
    for ahead, share in ((0, 0.0), (2, 0.0), (2, 0.5), (3, 0.0)):
        decoder, stream = streamed(source, ahead, share, coded)
        tokens = some_tokens(BATCH, 0)
        for _ in range(2):
            logits_of(decoder, tokens, 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = logits_of(decoder, tokens, 1)
        for seed in (0, 1, 2, 3, 2, 1):
            tokens.copy_(some_tokens(BATCH, seed))
            stream.before_replay()
            graph.replay()
            replayed = logits.clone()
            assert torch.equal(replayed, wanted[seed]), (ahead, share, seed)
            if seed == 2:  # eager steps may come between
                assert torch.equal(logits_of(decoder, some_tokens(BATCH, 3), 1), wanted[3])
        use = stream.use()
        stream.before_replay()
        assert stream.use().copied_bytes - use.copied_bytes == use.host_bytes
        assert use.host_bytes <= stream.residency.copied
        assert (use.host_bytes < stream.residency.copied) == (coded and format is None)
        stream.close()


@pytest.mark.parametrize(("name", "format"), [case[:2] for case in CODED])
def test_a_step_that_fails_leaves_the_next_one_right(name: str, format: str | None) -> None:
    """Some parts of a slot then hold those of a later layer, or these are on their way."""
    source = model(name, format)
    tokens = some_tokens(BATCH, 0)
    wanted = logits_of(source.decoder(), tokens, 1)
    for ahead in (0, 2, 3):
        decoder, stream = streamed(source, ahead, 0.0, True)
        for module, _ in large_modules(decoder.layers[3]):
            handle = module.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                logits_of(decoder, tokens, 1)
            handle.remove()
            for _ in range(2):
                assert torch.equal(logits_of(decoder, tokens, 1), wanted)
        stream.close()


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize(("name", "format"), [case[:2] for case in CODED])
def test_layers_that_all_stay_are_decoded(name: str, format: str | None) -> None:
    source = model(name, format)
    resident = source.decoder()
    wanted = [logits_of(resident, some_tokens(BATCH, seed), 1) for seed in range(STEPS)]
    blank = blank_decoder(source.config)
    storage = storage_of(blank, source.formats(), torch.bfloat16, packed=True)
    blocks = [layer.block for layer in storage.layers]
    codes = [layer.coded_modules for layer in storage.layers]
    working = storage.largest_module
    residency = choose_coded(blocks, codes, working, working + sum(map(sum, codes)), 2)
    assert residency is not None and not residency.streamed
    stream = stream_of(residency, torch.device("cuda"), prefetch=True, poison=True)
    decoder = source.decoder(stream)
    for seed, expected in enumerate(wanted):
        assert torch.equal(logits_of(decoder, some_tokens(BATCH, seed), 1), expected)
    assert stream.use().copied_bytes == 0
    stream.close()


def answers(engine: Engine) -> list[tuple[int, ...]]:
    greedy: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    # One after the other: what else is in a step decides which kernel multiplies.
    streams = (engine.stream([5 + n] * (30 + 50 * n), **greedy) for n in range(4))
    alone = [tuple(stream.result().token_ids) for stream in streams]
    together = [engine.stream([5 + n] * (30 + 50 * n), **greedy) for n in range(4)]
    assert all(len(stream.result().token_ids) == 24 for stream in together)
    return alone


@pytest.mark.parametrize(
    ("name", "weight_bits", "coded"),
    [
        ("debian-8m-dense", None, True),
        ("debian-8m-dense", None, False),
        ("debian-8m-dense", 4, True),
        ("debian-moe-8m", None, True),
        ("debian-moe-8m", 4, False),
    ],
)
def test_an_engine_keeps_to_its_budget(name: str, weight_bits: int | None, coded: bool) -> None:
    few: dict[str, Any] = {
        **{"device": "cuda", "max_sequences": 4, "max_step_tokens": 64, "max_context": 512},
        **{"prefix_cache": False, "stream_coded": coded},
    }
    knobs = Knobs(weight_bits=weight_bits, memory_budget=1)
    with Engine(MODELS / name, knobs=knobs, **few) as resident:
        wanted = answers(resident)
        assert resident.load.stream is None
    del resident
    torch.cuda.empty_cache()
    budget = least_budget(MODELS / name, few, weight_bits) * 1.006  # three digits are told
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    knobs = Knobs(weight_bits=weight_bits, memory_budget=budget, prefetch=1)
    with Engine(MODELS / name, knobs=knobs, **few) as engine:
        assert answers(engine) == wanted
        use = engine.load.stream
        assert use is not None and use.stalled_seconds > 0
        shorter = any(each.coded < each.block for each in engine.model.storage.layers)
        assert use.coded == (coded and shorter)
        assert use.copied_bytes >= engine.load.steps * use.host_bytes
        assert torch.cuda.max_memory_allocated() - before < budget * 2**30


def least_budget(folder: Path, settings: dict[str, Any], weight_bits: int | None) -> float:
    """GiB, as the refusal of a smaller one tells; three digits of it."""
    knobs = Knobs(weight_bits=weight_bits, memory_budget=0.0001, prefetch=1)
    with pytest.raises(ConfigError) as refused:
        Engine(folder, knobs=knobs, **settings)
    found = re.search(r"least for this model is (\S+) GiB", str(refused.value))
    assert found is not None
    return float(found[1])


def test_memory_that_is_locked_can_be_copied_from_and_unlocked() -> None:
    block = HostBlock(10_000_001)
    block.memory.fill_(9)
    block.lock()
    assert block.memory.is_pinned()
    assert (block.memory.to("cuda", non_blocking=True) == 9).all()
    block.close()
