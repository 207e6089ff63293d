"""Who runs next: decoding first, prompts in chunks, the latest arrival gives way."""

from collections.abc import Callable

from conclave.worker.scheduling.cache import BlockManager
from conclave.worker.scheduling.scheduler import PATIENCE, Scheduler, Share
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
        step = it.schedule(0.0)
        seen.append(counts(step))
        run(step, it)
    assert seen == [[16], [16], [8], [1]]


def test_decoding_is_never_starved_by_a_long_prompt(make_sequence: MakeSequence) -> None:
    it = scheduler(tokens=16)
    early_long = make_sequence(list(range(100, 200)))
    short = make_sequence([1, 2])
    it.add(short)
    run(it.schedule(0.0), it)
    it.add(early_long)
    for _ in range(4):
        step = it.schedule(0.0)
        assert (short, 1) in [(share.sequence, share.count) for share in step]
        assert sum(counts(step)) == 16
        run(step, it)


def test_latest_arrival_is_preempted_and_comes_back_first(make_sequence: MakeSequence) -> None:
    it = scheduler(blocks=4, prefix_cache=False)
    first, second = make_sequence(list(range(7))), make_sequence(list(range(7)))
    third = make_sequence([1])
    it.add(first)
    it.add(second)
    run(it.schedule(0.0), it)
    run(it.schedule(0.0), it)
    it.add(third)
    step = it.schedule(0.0)
    assert [share.sequence for share in step] == [first]
    assert second.state is State.WAITING and second.computed == 0 and second.preemptions == 1
    assert list(it.waiting) == [second, third]


def test_who_gives_way_comes_back_in_order_of_arrival(make_sequence: MakeSequence) -> None:
    it = scheduler()
    first, second, third, fourth = (make_sequence([1, 2, 3]) for _ in range(4))
    for sequence in (first, second, third):
        it.add(sequence)
    run(it.schedule(0.0), it)
    it.add(fourth)
    it.give_way([second, third, first])
    assert list(it.waiting) == [first, second, third, fourth]


def test_preempted_share_is_taken_back(make_sequence: MakeSequence) -> None:
    """A victim that decodes already stands in the step when an older prompt needs its blocks."""
    it = scheduler(blocks=11, tokens=16, prefix_cache=False)
    old, young = make_sequence(list(range(40))), make_sequence([1, 2, 3])
    it.add(young)
    run(it.schedule(0.0), it)
    it.add(old)
    for expected in ([1, 15], [1, 15]):
        step = it.schedule(0.0)
        assert counts(step) == expected
        run(step, it)
    step = it.schedule(0.0)
    assert [(share.sequence, share.count) for share in step] == [(old, 10)]
    assert young.state is State.WAITING and it.preemptions == 1


def test_second_output_waits_for_the_first_ones_prompt(make_sequence: MakeSequence) -> None:
    it = scheduler(tokens=16)
    leader = make_sequence(list(range(20)))
    follower = make_sequence(list(range(20)), leader=leader)
    other = make_sequence([5, 6, 7])
    for sequence in (leader, follower, other):
        it.add(sequence)
    run(it.schedule(0.0), it)
    step = it.schedule(0.0)
    run(step, it)
    assert [share.sequence for share in step] == [leader, other]
    step = it.schedule(0.0)
    assert (follower, 4) in [(share.sequence, share.count) for share in step]
    assert follower.cached == 16


def test_follower_of_a_lost_leader_runs_alone(make_sequence: MakeSequence) -> None:
    it = scheduler()
    leader = make_sequence(list(range(20)))
    follower = make_sequence(list(range(20)), leader=leader)
    it.add(leader)
    it.add(follower)
    it.schedule(0.0)
    it.finish(leader)
    assert [share.sequence for share in it.schedule(0.0)] == [follower]


def test_at_most_max_sequences_run(make_sequence: MakeSequence) -> None:
    it = scheduler(sequences=3, tokens=64)
    for _ in range(5):
        it.add(make_sequence([1, 2, 3]))
    assert len(it.schedule(0.0)) == 3
    assert len(it.waiting) == 2


def test_finish_frees_blocks_in_every_state(make_sequence: MakeSequence) -> None:
    it = scheduler()
    running, waiting = make_sequence([1, 2, 3]), make_sequence([4])
    it.add(running)
    run(it.schedule(0.0), it)
    it.add(waiting)
    it.finish(running)
    it.finish(waiting)
    it.finish(running)
    assert it.blocks.use()[0].used == 0
    assert not it.running and not it.waiting and it.schedule(0.0) == []


def parked(it: Scheduler, sequence: Sequence, now: float) -> Sequence:
    """Compute a new sequence and park it."""
    it.add(sequence)
    while sequence.remaining:
        for share in it.schedule(now):
            it.commit(share)
    it.park(sequence, now)
    return sequence


def test_parked_sequence_keeps_its_blocks_and_does_not_run(make_sequence: MakeSequence) -> None:
    it = scheduler()
    stepped = parked(it, make_sequence([1, 2, 3]), now=0.0)
    assert it.schedule(0.0) == [] and it.patience_ends is None
    assert it.blocks.use()[0].used == 1
    stepped.append(7)
    it.wake(stepped)
    assert counts(it.schedule(0.0)) == [1]
    it.park(stepped, 0.0)
    it.finish(stepped)
    assert it.blocks.use()[0].used == 0 and not it.parked


def test_parked_for_a_moment_is_a_victim_like_any_other(make_sequence: MakeSequence) -> None:
    it = scheduler(blocks=4, prefix_cache=False)
    first = make_sequence(list(range(8)))
    middle, last = make_sequence([1] * 3), make_sequence([2] * 3)
    it.add(first)
    it.schedule(0.0)
    for sequence in (middle, last):
        it.add(sequence)
    run(it.schedule(0.0), it)
    assert first.remaining == 1
    it.park(middle, 0.1)
    it.park(last, 0.0)  # longer, but both are fresh: the latest arrival gives way
    assert [share.sequence for share in it.schedule(0.2)] == [first]
    assert not last.tables and middle.tables
    assert last.preemptions == 1 and list(it.parked) == [middle]
    last.append(7)
    it.wake(last)
    assert list(it.waiting) == [last] and last.state is State.WAITING


def test_parked_too_long_is_the_first_victim(make_sequence: MakeSequence) -> None:
    it = scheduler(blocks=4, prefix_cache=False)
    sleeper = parked(it, make_sequence([1] * 4), now=0.0)
    first, second = make_sequence(list(range(4))), make_sequence(list(range(7)))
    it.add(first)
    it.add(second)
    run(it.schedule(0.5), it)
    assert [share.sequence for share in it.schedule(PATIENCE)] == [first, second]
    assert not sleeper.tables and it.preemptions == 1


def test_newcomers_wait_for_a_caller_at_work_but_not_for_one_that_sleeps(
    make_sequence: MakeSequence,
) -> None:
    for it in (scheduler(blocks=2, prefix_cache=False), scheduler(sequences=1)):
        sleeper = parked(it, make_sequence([1] * 5), now=0.0)
        newcomer = make_sequence([2] * 5)
        it.add(newcomer)
        assert it.schedule(PATIENCE / 2) == [] and it.patience_ends == PATIENCE
        assert [share.sequence for share in it.schedule(PATIENCE)] == [newcomer]
        sleeper.append(3)
        it.wake(sleeper)
        assert list(it.waiting) == [sleeper]
        it.finish(sleeper)
        it.finish(newcomer)
        assert it.blocks.use()[0].used == 0 and not it.waiting
