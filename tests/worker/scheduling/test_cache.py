"""Block tables: reuse, sliding windows, and no block ever lost."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conclave.worker.scheduling.cache import SLID, BlockManager, BlockPool
from conclave.worker.scheduling.sequence import Sequence

from .computing import compute

MakeSequence = Callable[..., Sequence]


def manager(blocks: int = 16, window: int | None = 8, prefix_cache: bool = True) -> BlockManager:
    return BlockManager((None, window), (blocks, blocks), 4, prefix_cache)


def used(blocks: BlockManager) -> list[int]:
    return [use.used for use in blocks.use()]


def test_sliding_group_keeps_only_the_window(make_sequence: MakeSequence) -> None:
    blocks = manager(blocks=16, window=8)
    sequence = make_sequence(list(range(40)))
    compute(blocks, sequence, chunk=4)
    # The next query, at position 40, looks back to 33, in block 8; blocks 0 to 7 have slid out.
    assert list(sequence.tables[1][:8]) == [SLID] * 8
    assert SLID not in sequence.tables[1][8:]
    assert used(blocks) == [10, 2]
    blocks.release(sequence)
    assert used(blocks) == [0, 0]


def test_prefix_is_reused_up_to_the_last_full_block(make_sequence: MakeSequence) -> None:
    blocks = manager()
    first = make_sequence(list(range(10)))
    compute(blocks, first)
    second = make_sequence([*range(9), 77, 78])
    assert blocks.admit(second, 64)
    assert second.computed == 8
    assert second.tables[0][:2] == first.tables[0][:2]


def test_last_token_is_always_computed(make_sequence: MakeSequence) -> None:
    blocks = manager()
    compute(blocks, make_sequence(list(range(8))))
    again = make_sequence(list(range(8)))
    assert blocks.admit(again, 64)
    assert again.computed == 4


def test_wanted_prompt_logprobs_limit_the_reuse(make_sequence: MakeSequence) -> None:
    blocks = manager()
    compute(blocks, make_sequence(list(range(16))))
    scored = make_sequence(list(range(16)), logprobs_from=9)
    assert blocks.admit(scored, 64)
    assert scored.computed == 8


def test_prefix_needs_the_window_of_the_sliding_group(make_sequence: MakeSequence) -> None:
    blocks = manager(blocks=12, window=8)
    first = make_sequence(list(range(32)))
    compute(blocks, first, chunk=8)
    blocks.release(first)
    # Overwrite the sliding pool: its blocks from the prefix are forgotten, the full ones are not.
    pool = blocks.pools[1]
    taken = [pool.allocate() for _ in range(pool.free)]
    for block in taken:
        pool.release(block)
    again = make_sequence(list(range(32)))
    assert blocks.admit(again, 64)
    assert again.computed == 0


def test_prefix_may_begin_after_slid_blocks(make_sequence: MakeSequence) -> None:
    blocks = manager(blocks=16, window=8)
    compute(blocks, make_sequence(list(range(32))))
    again = make_sequence([*range(32), 50])
    assert blocks.admit(again, 64)
    assert again.computed == 32
    assert list(again.tables[1][:6]) == [SLID] * 6  # position 32 looks back to 25, in block 6


def test_different_beginnings_share_nothing(make_sequence: MakeSequence) -> None:
    blocks = manager()
    compute(blocks, make_sequence([1, *range(1, 12)]))
    other = make_sequence([2, *range(1, 12)])
    assert blocks.admit(other, 64)
    assert other.computed == 0


def test_without_prefix_cache_nothing_is_reused(make_sequence: MakeSequence) -> None:
    blocks = manager(prefix_cache=False)
    compute(blocks, make_sequence(list(range(12))))
    again = make_sequence(list(range(12)))
    assert blocks.admit(again, 64)
    assert again.computed == 0


def test_admission_is_all_or_nothing(make_sequence: MakeSequence) -> None:
    blocks = manager(blocks=4)
    compute(blocks, make_sequence(list(range(9))))
    refused = make_sequence(list(range(100, 108)))
    before = used(blocks)
    assert not blocks.admit(refused, 64)
    assert used(blocks) == before and refused.tables == ()


def test_least_recently_freed_content_goes_first() -> None:
    pool = BlockPool(3)
    old, young, empty = pool.allocate(), pool.allocate(), pool.allocate()
    pool.remember(old, b"old")
    pool.remember(young, b"young")
    for block in (old, young, empty):
        pool.release(block)
    assert pool.cached == 2
    assert pool.allocate() == empty
    assert pool.allocate() == old
    assert pool.find(b"old") is None and pool.find(b"young") == young


def test_releasing_twice_is_a_mistake() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError):
        pool.release(block)


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=12),
    window=st.sampled_from([None, 1, 3, 8, 100]),
    chunk=st.sampled_from([1, 5, 64]),
    prefix_cache=st.booleans(),
)
def test_no_block_is_lost_and_no_writer_shares(
    prompts: list[list[int]], window: int | None, chunk: int, prefix_cache: bool
) -> None:
    """Whatever runs, references add up, and a block that is written has one owner."""
    from conclave.worker.sampling import SamplingParams

    blocks = manager(blocks=24, window=window, prefix_cache=prefix_cache)
    open_sequences: list[Sequence] = []
    for arrival, tokens in enumerate(prompts):
        sequence = Sequence("r", 0, list(tokens), len(tokens), 99, SamplingParams(), 0, arrival)
        while not blocks.admit(sequence, chunk):
            blocks.release(open_sequences.pop(0))
        open_sequences.append(sequence)
        while sequence.remaining:
            end = min(sequence.computed + chunk, len(sequence.tokens))
            if not blocks.extend(sequence, end):
                break
            for group, pool in enumerate(blocks.pools):
                for index in range(sequence.computed // 4, -(-end // 4)):
                    assert pool._references[sequence.tables[group][index]] == 1
            blocks.commit(sequence, end)
    for group, pool in enumerate(blocks.pools):
        held = [b for s in open_sequences for b in s.tables[group] if b != SLID]
        assert sum(pool._references) == len(held)
        assert pool.free == pool.blocks - len(set(held))
    for sequence in open_sequences:
        blocks.release(sequence)
    assert used(blocks) == [0, 0]
    assert all(p.cached == sum(h is not None for h in p._hash) for p in blocks.pools)


def test_broken_content_is_never_found_again(make_sequence: MakeSequence) -> None:
    blocks = manager(window=8)
    broken = make_sequence(list(range(40)))
    compute(blocks, broken, chunk=4)
    held = [block for block in broken.tables[0] if block != SLID]
    blocks.discard(broken)
    full, sliding = blocks.take_soiled()
    assert sorted(full) == sorted(held)
    assert len(sliding) == 10, "blocks that had slid out were reusable too"
    assert blocks.take_soiled() == [[], []]
    assert [use.cached for use in blocks.use()] == [0, 0]
    again = make_sequence(list(range(40)))
    compute(blocks, again)
    assert used(blocks)[0] == 10
    blocks.release(again)
    assert used(blocks) == [0, 0]


def test_broken_blocks_that_others_hold_are_wiped_when_those_let_go(
    make_sequence: MakeSequence,
) -> None:
    blocks = manager(window=None)
    first, second = make_sequence(list(range(9))), make_sequence(list(range(10)))
    compute(blocks, first)
    compute(blocks, second)
    shared = second.tables[0][:2]
    assert shared == first.tables[0][:2]
    own = second.tables[0][2:]
    blocks.discard(second)
    assert blocks.take_soiled()[0] == list(own)
    newcomer = make_sequence(list(range(10)))
    compute(blocks, newcomer)
    assert not set(newcomer.tables[0]) & set(shared)
    blocks.release(first)
    assert sorted(blocks.take_soiled()[0]) == sorted(shared)
    blocks.release(newcomer)
    assert used(blocks) == [0, 0]
