"""Who runs next: decoding first, prompts in chunks, the latest arrival gives way."""

from collections.abc import Callable

from conclave.worker.scheduling.cache import BlockManager
from conclave.worker.scheduling.scheduler import Scheduler, Share
from conclave.worker.scheduling.sequence import Sequence, State

MakeSequence = Callable[..., Sequence]


def scheduler(
    blocks: int = 64, sequences: int = 8, tokens: int = 16, prefix_cache: bool = True
) -> Scheduler:
    return Scheduler(BlockManager((None,), (blocks,), 4, prefix_cache), sequences, tokens)


def run(step: list[Share], it: Scheduler, token: int = 7) -> None:
    """Pretend to compute a step: every sequence that is up to date gets one token."""
    for share in step:
        it.commit(share)
        if share.sequence.remaining == 0:
            share.sequence.append(token)


def counts(step: list[Share]) -> list[int]:
    return [share.count for share in step]


def test_long_prompt_is_cut_into_chunks(make_sequence: MakeSequence) -> None:
    it = scheduler(tokens=16)
    it.add(make_sequence(list(range(40))))
    seen = []
    for _ in range(4):
        step = it.schedule()
        seen.append(counts(step))
        run(step, it)
    assert seen == [[16], [16], [8], [1]]


def test_decoding_is_never_starved_by_a_long_prompt(make_sequence: MakeSequence) -> None:
    it = scheduler(tokens=16)
    early_long = make_sequence(list(range(100, 200)))
    short = make_sequence([1, 2])
    it.add(short)
    run(it.schedule(), it)
    it.add(early_long)
    for _ in range(4):
        step = it.schedule()
        assert (short, 1) in [(share.sequence, share.count) for share in step]
        assert sum(counts(step)) == 16
        run(step, it)


def test_latest_arrival_is_preempted_and_comes_back_first(make_sequence: MakeSequence) -> None:
    it = scheduler(blocks=4, prefix_cache=False)
    first, second = make_sequence(list(range(7))), make_sequence(list(range(7)))
    third = make_sequence([1])
    it.add(first)
    it.add(second)
    run(it.schedule(), it)
    run(it.schedule(), it)
    it.add(third)
    step = it.schedule()
    assert [share.sequence for share in step] == [first]
    assert second.state is State.WAITING and second.computed == 0 and second.preemptions == 1
    assert list(it.waiting) == [second, third]


def test_preempted_share_is_taken_back(make_sequence: MakeSequence) -> None:
    """A victim that decodes already stands in the step when an older prompt needs its blocks."""
    it = scheduler(blocks=11, tokens=16, prefix_cache=False)
    old, young = make_sequence(list(range(40))), make_sequence([1, 2, 3])
    it.add(young)
    run(it.schedule(), it)
    it.add(old)
    for expected in ([1, 15], [1, 15]):
        step = it.schedule()
        assert counts(step) == expected
        run(step, it)
    step = it.schedule()
    assert [(share.sequence, share.count) for share in step] == [(old, 10)]
    assert young.state is State.WAITING and it.preemptions == 1


def test_second_output_waits_for_the_first_ones_prompt(make_sequence: MakeSequence) -> None:
    it = scheduler(tokens=16)
    leader = make_sequence(list(range(20)))
    follower = make_sequence(list(range(20)), leader=leader)
    other = make_sequence([5, 6, 7])
    for sequence in (leader, follower, other):
        it.add(sequence)
    run(it.schedule(), it)
    step = it.schedule()
    run(step, it)
    assert [share.sequence for share in step] == [leader, other]
    step = it.schedule()
    assert (follower, 4) in [(share.sequence, share.count) for share in step]
    assert follower.cached == 16


def test_follower_of_a_lost_leader_runs_alone(make_sequence: MakeSequence) -> None:
    it = scheduler()
    leader = make_sequence(list(range(20)))
    follower = make_sequence(list(range(20)), leader=leader)
    it.add(leader)
    it.add(follower)
    it.schedule()
    it.finish(leader)
    assert [share.sequence for share in it.schedule()] == [follower]


def test_at_most_max_sequences_run(make_sequence: MakeSequence) -> None:
    it = scheduler(sequences=3, tokens=64)
    for _ in range(5):
        it.add(make_sequence([1, 2, 3]))
    assert len(it.schedule()) == 3
    assert len(it.waiting) == 2


def test_finish_frees_blocks_in_every_state(make_sequence: MakeSequence) -> None:
    it = scheduler()
    running, waiting = make_sequence([1, 2, 3]), make_sequence([4])
    it.add(running)
    run(it.schedule(), it)
    it.add(waiting)
    it.finish(running)
    it.finish(waiting)
    it.finish(running)
    assert it.blocks.use()[0].used == 0
    assert not it.running and not it.waiting and it.schedule() == []
