"""The knobs by themselves, and what an engine makes of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from conclave.kernels.formats import Format, PackedWeight
from conclave.kernels.layouts import pack
from conclave.worker import Engine, EngineConfig, Knobs
from conclave.worker.compress.checkpoint import CheckpointWriter
from conclave.worker.compress.manifest import REST
from conclave.worker.errors import ConfigError, InvalidRequest
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.packed import packed_order
from conclave.worker.precision import Precision
from conclave.worker.weights import load_decoder

SMALL: dict[str, Any] = {"max_context": 96, "block_size": 4, "threads": 1}
CACHED = SMALL | {"kv_tokens": 1024}
Checkpoint = Callable[[int | str], Path]


@pytest.mark.parametrize(
    ("sparsity", "bits", "format"),
    [
        (None, None, None),
        (0, None, None),
        (None, 16, None),
        (None, 8, "dense-int8-g64"),
        (0, 4, "dense-int4-g64"),
        (0.5, None, "8:16-bf16"),
        (0.05, 8, "15:16-int8-g64"),
        (0.6875, 4, "5:16-int4-g64"),
        (0.7, 4, "4:16-int4-g64"),
        (0.75, 16, "4:16-bf16"),
    ],
)
def test_the_format_prunes_at_least_so_much(
    sparsity: float | None, bits: int | None, format: str | None
) -> None:
    assert Knobs(sparsity=sparsity, weight_bits=bits).weight_format == format


@pytest.mark.parametrize(
    ("budget", "size"), [(None, None), (2, 2**31), ("0.5", 2**29), ("60%", 6000), ("100%", 10_000)]
)
def test_a_budget_is_gib_or_a_share(budget: Any, size: int | None) -> None:
    assert Knobs(memory_budget=budget).budget(10_000) == size


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sparsity", 0.8, "must be 0 to 0.75"),
        ("sparsity", -0.1, "must be 0 to 0.75"),
        ("sparsity", float("nan"), "finite"),
        ("weight_bits", 6, "choose one of 4, 8, 16"),
        ("memory_budget", "60 GB", "give GiB"),
        ("memory_budget", "101%", "a share of the memory"),
        ("memory_budget", 0, "give GiB"),
        ("memory_budget", float("inf"), "give GiB"),
        ("memory_budget", True, "give GiB"),
        ("max_error", 0.0005, "must be 0.001 to 0.5"),
        ("max_error", 0.6, "must be 0.001 to 0.5"),
        ("prefetch", 9, "0 to 8 layers ahead"),
        ("prefetch", -1, "0 to 8 layers ahead"),
        ("prefetch", "often", "valid boolean"),
        ("prefetch_depth", 2, "not permitted"),
    ],
)
def test_what_is_no_knob_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Knobs.model_validate({field: value})


@pytest.mark.parametrize(
    ("prefetch", "ahead"), [(None, 2), (True, 2), (False, 0), (0, 0), (1, 1), (5, 5)]
)
def test_prefetch_is_so_many_layers_ahead(prefetch: Any, ahead: int) -> None:
    assert Knobs(prefetch=prefetch).ahead == ahead


def test_knobs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Knobs().sparsity = 0.5


@pytest.mark.parametrize(
    ("fields", "at_fault"),
    [
        ({"sparsity": 0.7, "weight_bits": 4}, []),
        ({"sparsity": 0.6875}, []),
        ({"sparsity": 0, "weight_bits": 8}, ["knobs.sparsity", "knobs.weight_bits"]),
        ({"sparsity": 0.6}, ["knobs.sparsity"]),
    ],
)
def test_limits_of_a_request(fields: dict[str, object], at_fault: list[str]) -> None:
    broken = Knobs.checked(fields).limits_broken(Precision(0.6875, 4, 2.75))
    assert [violation.field for violation in broken] == at_fault


def test_a_request_s_knobs_are_checked_by_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Knobs.checked({"sparsity": 7, "weight_bits": 5, "max_error": 1})
    assert [v.field for v in caught.value.violations] == [
        "knobs.sparsity",
        "knobs.weight_bits",
        "knobs.max_error",
    ]
    with pytest.raises(InvalidRequest, match=r"memory_budget: is a worker's.*prefetch: is a work"):
        Knobs.checked({"memory_budget": 3, "prefetch": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_format": "dense-int8-g64", "knobs": {"weight_bits": 8}}, "weight_format or the"),
        ({"weight_format": "dense-int8-g64", "knobs": {"sparsity": 0}}, "weight_format or the"),
        ({"kv_tokens": 64, "knobs": {"memory_budget": 1}}, "kv_tokens and knobs.memory_budget"),
        ({"kv_memory_gib": 1, "knobs": {"memory_budget": 1}}, "give one, not both"),
        ({"kv_memory_gib": 1e300}, "kv_memory_gib\n.*less than or equal to 1048576"),
        ({"kv_host_gib": float("inf")}, "kv_host_gib\n.*less than or equal to 1048576"),
        ({"kv_host_gib": float("nan")}, "kv_host_gib\n.*less than or equal to 1048576"),
        ({"knobs": {"prefetch": True}}, "do not fit knobs.memory_budget: give that too"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EngineConfig.model_validate({"model": "m", **settings})


def test_an_engine_packs_as_its_knobs_say(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("4")
    knobs = Knobs(sparsity=0.6)
    with (
        Engine(EngineConfig(model=folder, knobs=knobs, **CACHED)) as sparse,
        Engine(folder, weight_format="6:16-bf16", **CACHED) as named,
        Engine(folder, **CACHED) as plain,
    ):
        assert sparse.model.storage.precision == Precision(0.625, 16, 32)
        assert sparse.model.fingerprint == named.model.fingerprint
        prompt = list(range(20, 40))
        greedy: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answers = [e.generate(prompt, **greedy).token_ids for e in (sparse, named, plain)]
        assert answers[0] == answers[1] != answers[2]
        assert plain.model.storage.precision == Precision(0, 32, 32)


def test_knobs_that_do_not_fit_the_weights_name_one(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"down.weight cannot be stored as dense-int8-g64: 96"):
        Engine(tiny_checkpoint("1"), knobs=Knobs(weight_bits=8), **CACHED)


def compressed(source: Path, target: Path, attention: str, rest: str) -> Path:
    """A checkpoint packed by magnitude, into one format for attention's weights and another one."""
    decoder = load_decoder(source, ModelConfig.load(source), torch.device("cpu"), torch.float32)
    writer = CheckpointWriter(target, source)
    weights: dict[str, torch.Tensor | PackedWeight] = dict(decoder.state_dict())
    for name in writer.contents.packable_names:
        format = Format.parse(attention if "attention" in name else rest)
        weights[name] = pack(packed_order(name, decoder.get_parameter(name).detach()), format)
    for index, (file, names) in enumerate(writer.contents.files.items()):
        part = {name: weights[name] for name in names}
        writer.write_rest(part) if file == REST else writer.write_layer(index, part)
    writer.finish({})
    return target


def test_a_compressed_checkpoint_must_be_what_they_ask(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = compressed(tiny_checkpoint("1"), tmp_path / "made", "5:16-int4-g32", "8:16-int8-g32")
    with Engine(folder, knobs=Knobs(weight_bits=4), **CACHED) as engine:
        found = engine.model.storage.precision
    assert found.weight_bits == 4 and 0.5 < found.sparsity < 0.6875
    low = found.sparsity - 0.03
    with Engine(folder, knobs={"sparsity": low, "weight_bits": 4}, **CACHED):
        pass
    for wrong, message in (
        ({"weight_bits": 8}, "weight_bits is 8 and its weights have 4. Leave"),
        ({"sparsity": 0.5, "weight_bits": 4}, r"sparsity is 0.5 and its weights have 0\.579"),
        ({"sparsity": 0.75}, "sparsity is 0.75"),
        ({"sparsity": 0}, "sparsity is 0 and"),
    ):
        with pytest.raises(ConfigError, match=message):
            Engine(folder, knobs=wrong, **CACHED)


def test_a_budget_holds_weights_cache_and_steps(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    few = SMALL | {"max_sequences": 4, "max_step_tokens": 32}
    with Engine(folder, **few) as free:
        weights, most = free.model.storage.bytes, free.model.cache.bytes
    decoder = free.model.runner.decoder
    assert weights == 4 * sum(each.numel() for each in (*decoder.parameters(), *decoder.buffers()))
    wide = Engine(folder, knobs=Knobs(memory_budget=1), **few)
    assert wide.model.cache.bytes == most  # nobody gets more than it can use
    wide.close()
    with Engine(folder, knobs=Knobs(memory_budget=0.0015), **few) as engine:
        assert most / 4 < engine.model.cache.bytes < min(most, 0.0015 * 2**30 - weights)
        assert len(engine.generate([20, 21], max_tokens=4, ignore_eos=True).token_ids) == 4


def test_a_budget_too_small_says_what_would_do(tiny_checkpoint: Checkpoint) -> None:
    few = SMALL | {"max_sequences": 4, "max_step_tokens": 32}
    message = r"is 0.0001 GiB, but the least for this model is (\S+) GiB \(.* stay, .*raise it, or"
    with pytest.raises(ConfigError, match=message) as caught:
        Engine(tiny_checkpoint("1"), knobs=Knobs(memory_budget=0.0001), **few)
    found = re.search(message, str(caught.value))
    assert found is not None
    with Engine(tiny_checkpoint("1"), knobs=Knobs(memory_budget=found[1]), **few) as engine:
        assert engine.load.stream is not None and engine.load.stream.layers == 5
