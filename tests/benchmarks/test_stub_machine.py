"""The stub workers' prefix cache, and what a prompt costs before its first token."""

import pytest

from benchmarks.stub_cache import StubCache
from benchmarks.stub_machine import Machine, Settings, Told
from conclave.protos import generation_pb2 as pb


def test_only_full_blocks_with_all_before_them_are_found() -> None:
    cache = StubCache(blocks=8, block_bytes=2)
    assert cache.take(b"aabbc") == 0
    assert cache.take(b"aabbcc") == 2
    assert cache.take(b"aabbcc") == 3
    assert cache.take(b"xxbbcc") == 0


def test_the_least_recently_used_goes_and_of_a_prompt_its_end() -> None:
    cache = StubCache(blocks=4, block_bytes=1)
    cache.take(b"abc")
    cache.take(b"xy")
    assert cache.take(b"abc") == 2, "only its last block made room"
    assert cache.take(b"xy") == 1
    assert cache.take(b"xy") == 2, "it has just been used"
    assert StubCache(blocks=0, block_bytes=1).take(b"a") == 0


def test_what_is_held_costs_no_time_and_prompts_are_computed_in_turn() -> None:
    told: dict[str, list[Told]] = {}
    machine = Machine(Settings(prefill_rate=100.0, cache_blocks=64))

    def ask(name: str, prompt: str) -> None:
        sampling = pb.SamplingParams(max_tokens=1, ignore_eos=True)
        request = pb.GenerateRequest(
            request_id=name, prompt=pb.Prompt(text=prompt), sampling=sampling
        )
        machine.submit(request, told.setdefault(name, []).append, 0.0, None)

    def answered(now: float) -> list[str]:
        machine.step(now)
        return [name for name, events in told.items() if events]

    ask("first", 400 * "a")  # 100 tokens
    ask("same", 400 * "a" + 160 * "b")  # 140, of which 96 are in the first one's full blocks
    ask("other", 400 * "c")
    assert answered(0.0) == []
    assert answered(1.02) == ["first"]
    assert answered(1.40) == ["first"]
    assert answered(1.46) == ["first", "same"]
    assert answered(2.48) == ["first", "same", "other"]

    usages = {name: events[-1].finished.usage for name, events in told.items()}  # type: ignore[union-attr]
    assert [usages[name].cached_tokens for name in told] == [0, 96, 0]
    assert machine.load(2.5, 2.5, False).cached_tokens == 96


@pytest.mark.parametrize(("tokens", "cached"), [(16, 0), (32, 16)])
def test_at_least_one_token_is_computed(tokens: int, cached: int) -> None:
    machine = Machine(Settings(cache_blocks=64))
    text = pb.Prompt(text=tokens * "same")
    for _ in range(2):
        machine.submit(pb.GenerateRequest(prompt=text), lambda _: None, 0.0, None)
        machine.step(0.0)
    assert machine.load(0.0, 0.0, False).cached_tokens == cached
