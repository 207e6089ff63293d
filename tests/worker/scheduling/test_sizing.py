"""How the cache's memory is divided."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conclave.kernels.attention import wide_scratch
from conclave.kernels.attention.wide_scratch import Scratch
from conclave.worker.config import EngineConfig
from conclave.worker.errors import ConfigError
from conclave.worker.model.config import CacheGroup, ModelConfig
from conclave.worker.scheduling.sizing import enough_gib, plan_cache
from conclave.worker.scheduling.workspace import workspace

FULL = CacheGroup(window=None, layers=(1,), values_per_token=256)
SLIDING = CacheGroup(window=128, layers=(0,), values_per_token=1024)


BYTES = [group.bytes_per_token(2) for group in (FULL, SLIDING)]


def config(**fields: object) -> EngineConfig:
    return EngineConfig.model_validate({"model": Path("unused"), **fields})


def test_sliding_layers_take_no_more_than_their_windows() -> None:
    plan = plan_cache(
        config(max_sequences=2, max_step_tokens=64), (FULL, SLIDING), 4096, BYTES, 2**40
    )
    assert plan.max_context == 4096
    assert plan.blocks == (2 * 256, 2 * (12 + 2))


def test_too_little_memory_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match="lower max_context"):
        plan_cache(config(), (FULL, SLIDING), 4096, BYTES, 100_000)


def test_memory_is_never_exceeded() -> None:
    memory = 64 * 2**20
    plan = plan_cache(config(max_context=1024), (FULL, SLIDING), 4096, BYTES, memory)
    assert 0.9 * memory < plan.bytes <= memory


def test_as_many_as_fit_exactly_fit() -> None:
    for sequences in (49, 98, 103, 107, 161, 187, 196, 197):
        wanted = config(max_context=1024, max_sequences=sequences, max_step_tokens=64)
        blocks, size = 1024 // wanted.block_size, wanted.block_size
        found = plan_cache(wanted, (FULL,), 4096, BYTES[:1], blocks * size * BYTES[0])
        assert found.blocks == (blocks,)


@given(st.integers(1, 2**50))
def test_the_gib_that_are_told_are_enough(size: int) -> None:
    assert size <= int(float(enough_gib(size)) * 2**30) <= 1.01 * size + 1


@given(st.integers(1, 64), st.integers(1, 4096))
def test_a_host_as_large_as_was_told_is_taken(block: int, context: int) -> None:
    few = {"block_size": block, "max_context": context}
    with pytest.raises(ConfigError) as caught:
        plan_cache(config(kv_host_gib=1e-9, **few), (FULL, SLIDING), 4096, BYTES, 2**40)
    told = str(caught.value).split()[-1]
    found = plan_cache(config(kv_host_gib=told, **few), (FULL, SLIDING), 4096, BYTES, 2**40)
    assert min(found.host) == 1


def test_kv_tokens_set_the_full_layers() -> None:
    plan = plan_cache(config(max_context=256, kv_tokens=512), (FULL, SLIDING), 4096, BYTES, 0)
    assert plan.blocks[0] == 32
    assert plan.blocks[1] >= 16


def test_default_context_is_bounded() -> None:
    assert plan_cache(config(max_sequences=1), (FULL,), 10**6, BYTES[:1], 2**40).max_context == 8192


def test_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="limit of 4096"):
        plan_cache(config(max_context=5000), (FULL,), 4096, BYTES[:1], 2**40)


def test_two_sizes_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="not both"):
        config(kv_tokens=512, kv_memory_gib=1.0)


def test_a_budget_that_is_too_small_names_itself() -> None:
    with pytest.raises(ConfigError, match=r"raise knobs.memory_budget, or lower max_context"):
        plan_cache(config(knobs={"memory_budget": 1}), (FULL, SLIDING), 4096, BYTES, 100_000)


def test_a_step_takes_more_the_more_runs_in_it() -> None:
    model = ModelConfig.parse({"model_type": "gemma4_text", "num_hidden_layers": 6})
    usual = config(max_sequences=16, max_step_tokens=512)

    def size(settings: EngineConfig = usual, context: int = 8192, expanded: int = 0) -> int:
        return workspace(settings, model, context, 2, expanded)

    # 512 scored tokens over 262,144 words, twice as many bytes a logit as float32 and bfloat16.
    assert size(context=512) > 512 * 262_144 * 12
    assert size(expanded=1000) == size() + 1000
    assert size(context=131_072) > size()
    assert size(config(max_sequences=256, max_step_tokens=512)) > size()
    assert size(config(max_sequences=16, max_step_tokens=2048)) > 3 * size()


def test_a_step_has_room_for_what_prefill_writes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of scores: where those are there, the kernel that writes that is not."""
    shape = {"num_hidden_layers": 6, "vocab_size": 64, "global_head_dim": 512}
    model = ModelConfig.parse({"model_type": "gemma4_text", **shape})
    (heads,) = {layer.heads for layer in model.layers if layer.head_dim == 512}

    def more(tokens: int, context: int, dtype_size: int) -> int:
        """What it adds to the scores, which are counted at any rate."""
        settings = config(max_sequences=1, max_step_tokens=tokens)
        with_it = workspace(settings, model, context, dtype_size, 0)
        with monkeypatch.context() as without:
            without.setattr(wide_scratch, "DIM", 0)
            return with_it - workspace(settings, model, context, dtype_size, 0)

    scores = 2 * heads * 64 * 64 * 4
    assert more(64, 64, 2) == Scratch.of(64, heads, 64).bytes - scores > 0
    assert more(63, 64, 2) == 0, "another kernel"
    assert more(64, 64, 4) == 0, "float32"
    assert more(2048, 8192, 2) == 0, "scores are larger"
