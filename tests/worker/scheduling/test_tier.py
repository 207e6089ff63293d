"""Blocks that lose their place go on in host memory, and what comes back is what was there."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from conclave.worker.sampling import SamplingParams
from conclave.worker.scheduling.cache import SLID, BlockManager
from conclave.worker.scheduling.scheduler import Scheduler
from conclave.worker.scheduling.sequence import Sequence, State
from conclave.worker.scheduling.tier import HostPool, Moves

from .computing import compute

MakeSequence = Callable[..., Sequence]
SIZE = 4
NOTHING = Moves((), ())


class Device:
    """What lies in the blocks and slots of one group: the tokens before each block's end."""

    def __init__(self, blocks: int, slots: int) -> None:
        self.blocks: list[object] = [None] * blocks
        self.slots: list[object] = [None] * slots

    def make(self, moves: Moves) -> None:
        # In whatever order copies are made, nobody writes over another.
        assert len({block for _, block in moves.restored}) == len(moves.restored)
        assert len({slot for _, slot in moves.spilled}) == len(moves.spilled)
        for block, slot in moves.spilled:
            self.slots[slot] = self.blocks[block]
        for slot, block in moves.restored:
            self.blocks[block] = self.slots[slot]


def test_what_is_needed_for_others_comes_back(make_sequence: MakeSequence) -> None:
    blocks = BlockManager((None,), (4,), SIZE, True, host=(8,))
    first, second = make_sequence(list(range(14))), make_sequence(list(range(100, 115)))
    compute(blocks, first)
    table = list(first.tables[0])
    assert blocks.take_moves() == (NOTHING,) and not blocks.restoring
    blocks.release(first)
    compute(blocks, second)
    (moves,) = blocks.take_moves()
    assert sorted(block for block, _ in moves.spilled) == sorted(table[:3]), "full ones alone"
    assert moves.restored == () and blocks.take_moves() == (NOTHING,)
    slots = dict(moves.spilled)
    blocks.release(second)
    assert blocks.admit(first, 64) and first.computed == 12 and blocks.restoring
    (back,) = blocks.take_moves()
    assert [slot for slot, _ in back.restored] == [slots[block] for block in table[:3]]
    assert [block for _, block in back.restored] == list(first.tables[0][:3])
    assert not blocks.restoring
    (use,) = blocks.host_use()
    assert (use.blocks, use.spilled, use.restored) == (8, 6, 3)


def test_what_is_there_already_is_not_copied_again(make_sequence: MakeSequence) -> None:
    blocks = BlockManager((None,), (3,), SIZE, True, host=(8,))
    first, second = make_sequence(list(range(9))), make_sequence(list(range(100, 109)))
    for _ in range(3):
        for sequence in (first, second):
            compute(blocks, sequence)
            blocks.release(sequence)
            blocks.take_moves()
    (use,) = blocks.host_use()
    assert use.spilled == 4 and use.restored == 8


def test_of_what_the_window_has_passed_the_end_of_the_prompt_is_kept(
    make_sequence: MakeSequence,
) -> None:
    blocks = BlockManager((8,), (12,), SIZE, True, host=(16,))
    asked = list(range(28))
    sequence = make_sequence(asked)
    compute(blocks, sequence)
    before = make_sequence(asked)  # begins at token 24, which looks back to 17, in block 4
    assert blocks.admit(before, 64) and before.computed == 24
    prompt = before.tables[0][4:6]
    blocks.release(before)
    sequence.tokens += range(50, 64)
    for end in range(29, 43):
        assert blocks.extend(sequence, end)
        blocks.commit(sequence, end)
    held = [block for block in sequence.tables[0] if block != SLID][:-1]
    assert not set(held) & set(prompt)
    blocks.release(sequence)
    blocks.take_moves()
    other = make_sequence(list(range(100, 148)))
    compute(blocks, other)
    (moves,) = blocks.take_moves()
    assert {block for block, _ in moves.spilled} == {*prompt, *held}
    blocks.release(other)
    again = make_sequence(asked)
    assert blocks.admit(again, 64) and again.computed == 24 and blocks.restoring


def test_broken_content_is_not_found_on_the_host(make_sequence: MakeSequence) -> None:
    blocks = BlockManager((None,), (3,), SIZE, True, host=(8,))
    broken = make_sequence(list(range(12)))
    compute(blocks, broken)
    blocks.release(broken)
    compute(blocks, other := make_sequence(list(range(100, 112))))
    blocks.take_moves()
    blocks.release(other)
    blocks.discard(broken)
    assert blocks.admit(broken, 64) and broken.computed == 0


def test_the_least_recently_used_goes_but_nothing_that_is_about_to_be_read() -> None:
    pool = HostPool(2)
    pool.spill(0, b"a")
    pool.spill(1, b"b")
    pool.restore(pool.claim(b"a"), 5)
    pool.spill(2, b"c")
    assert pool.holds(b"a") and not pool.holds(b"b")
    pool.restore(pool.claim(b"c"), 6)
    pool.spill(3, b"d")
    assert not pool.holds(b"d"), "both are about to be read"
    pool.forget(b"a")
    pool.spill(4, b"e")
    assert not pool.holds(b"e"), "even if nobody shall find it any more"
    moves = pool.take_moves()
    assert moves.spilled == ((0, 0), (2, 1)) and moves.restored == ((0, 5), (1, 6))
    pool.spill(4, b"e")
    assert pool.take_moves().spilled == ((4, 0),)


def test_a_block_that_is_taken_again_is_not_written() -> None:
    pool = HostPool(2)
    pool.spill(0, b"a")
    pool.take_moves()
    pool.restore(pool.claim(b"a"), 3)
    pool.abandon(3)
    assert not pool.restoring and pool.take_moves() == NOTHING


def test_others_run_while_a_sequence_arrives(make_sequence: MakeSequence) -> None:
    it = Scheduler(BlockManager((None,), (8,), SIZE, True, host=(16,)), 4, 64)
    idle, long = make_sequence(list(range(12))), make_sequence(list(range(100, 124)))
    it.add(idle)
    (share,) = it.schedule(0.0)
    it.commit(share)
    idle.append(1)
    it.park(idle, 0.0)
    it.add(long)
    (share,) = it.schedule(9.0)  # takes the place of the one whose caller sleeps
    it.commit(share)
    it.blocks.take_moves()
    it.finish(long)
    runs = make_sequence([1, 2])
    it.add(runs)
    (share,) = it.schedule(9.0)
    it.commit(share)
    runs.append(3)
    it.wake(idle)
    third = make_sequence([5])
    it.add(third)
    step = it.schedule(9.0)
    assert [share.sequence for share in step] == [runs] and it.arriving
    assert idle.state is State.RUNNING and idle.computed == 12 and third.state is State.WAITING
    assert len(it.blocks.take_moves()[0].restored) == 2, "one had kept its place"
    it.commit(step[0])
    runs.append(4)
    step = it.schedule(9.0)
    assert {share.sequence for share in step} == {runs, idle, third} and not it.arriving


def test_alone_it_is_waited_for(make_sequence: MakeSequence) -> None:
    it = Scheduler(BlockManager((None,), (4,), SIZE, True, host=(16,)), 4, 64)
    for sequence in (first := make_sequence(list(range(14))), make_sequence(list(range(50, 64)))):
        it.add(sequence)
        (share,) = it.schedule(0.0)
        it.commit(share)
        it.blocks.take_moves()
        it.finish(sequence)
    again = make_sequence(first.tokens)
    it.add(again)
    (share,) = it.schedule(0.0)
    assert share.sequence is again and share.count == 2 and it.blocks.restoring
    assert not it.arriving


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=16),
    window=st.sampled_from([None, 3, 8]),
    chunk=st.sampled_from([5, 64]),
    slots=st.sampled_from([1, 3, 40]),
    breaks=st.integers(0, 20),
    order=st.randoms(use_true_random=False),
)
def test_every_block_holds_what_its_table_says(
    prompts: list[list[int]], window: int | None, chunk: int, slots: int, breaks: int, order: object
) -> None:
    """Whatever runs, is preempted, comes back or breaks."""
    blocks = BlockManager((None, window), (9, 9), SIZE, True, host=(slots, slots))
    devices = [Device(9, slots), Device(9, slots)]
    waiting = [
        Sequence("r", 0, list(tokens), len(tokens), 99, SamplingParams(), 0, arrival)
        for arrival, tokens in enumerate(prompts)
    ]
    running: list[Sequence] = []
    for turn in range(3 * len(prompts)):
        sequence = waiting.pop(order.randrange(len(waiting)))  # type: ignore[attr-defined]
        while not blocks.admit(sequence, chunk):
            waiting.append(victim := running.pop(0))
            blocks.release(victim)
        running.append(sequence)
        while sequence.remaining:
            end = min(sequence.computed + chunk, len(sequence.tokens))
            fits = blocks.extend(sequence, end)
            for device, moves in zip(devices, blocks.take_moves(), strict=True):
                device.make(moves)
            if not fits:
                break
            for group, device in enumerate(devices):
                for index, block in enumerate(sequence.tables[group]):
                    begin = index * SIZE
                    if begin + SIZE <= sequence.computed:
                        known = tuple(sequence.tokens[: begin + SIZE])
                        assert block == SLID or device.blocks[block] == known
                    elif begin < end:
                        device.blocks[block] = tuple(sequence.tokens[: min(end, begin + SIZE)])
            blocks.commit(sequence, end)
        if turn == breaks:
            running.remove(sequence)
            blocks.discard(sequence)
            waiting.append(sequence)
        if not waiting:
            waiting.append(victim := running.pop(0))
            blocks.release(victim)
    for sequence in running:
        blocks.release(sequence)
    assert [use.used for use in blocks.use()] == [0, 0]
