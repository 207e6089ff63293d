"""Who runs in the next step, and with how many tokens: continuous batching with chunked prefill.

Each step has a budget of tokens. Decoding sequences come first, one token each; what is left goes
to prompts in order of arrival, cut into chunks. If blocks run out, the latest arrival gives its
blocks up; later it is computed again (recompute preemption, vLLM, SOSP 2023, section 4.5), but for
what has found a place in host memory. That comes back while the others run a step.

A sequence whose caller steps it is parked between two steps. It keeps its place like a running one
for as long as a caller that is at work needs to answer; taken away at once, every one of its tokens
would cost its whole prompt again. A caller that sleeps loses the place to whoever needs it: its
sequence is the first victim from then on, and the only one that gives way to a mere newcomer.
"""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from .cache import BlockManager
from .sequence import Sequence, State

PATIENCE = 1.0
"""Seconds for which a parked sequence counts as one that runs."""


@dataclass(frozen=True, slots=True)
class Share:
    """The next `count` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    count: int


class Scheduler:
    """Queues of waiting and running sequences over one block manager.

    Args:
        blocks: the block tables.
        max_sequences: most sequences in a step.
        max_step_tokens: most tokens in a step.
    """

    def __init__(self, blocks: BlockManager, max_sequences: int, max_step_tokens: int) -> None:
        self.blocks = blocks
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.parked: dict[Sequence, float] = {}
        """Sequences that hold blocks but have nothing to compute, and since when; longest first."""
        self.preemptions = 0
        self.most = max_sequences
        """Sequences that may hold blocks: fewer for a while, when they have been too many."""
        self.arriving = False
        """Whether the last step leaves a sequence out whose blocks come from the host meanwhile."""

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def park(self, sequence: Sequence, now: float) -> None:
        """Set a running sequence aside until `wake`; its blocks stay unless others need them."""
        self.running.remove(sequence)
        sequence.state = State.PARKED
        self.parked[sequence] = now

    def wake(self, sequence: Sequence) -> None:
        """Bring a parked sequence back; without its blocks it waits, first in the queue."""
        if self.parked.pop(sequence, None) is not None:
            sequence.state = State.RUNNING
            self._insert(sequence)
        else:
            sequence.state = State.WAITING
            self.waiting.appendleft(sequence)

    @property
    def patience_ends(self) -> float | None:
        """When a parked sequence will give way to those that wait; None if none does."""
        if not self.waiting or not self.parked:
            return None
        return next(iter(self.parked.values())) + PATIENCE

    def schedule(self, now: float) -> list[Share]:
        """Choose the next step; empty if nothing waits or runs, or if it waits for parked ones.

        Args:
            now: on the clock that `park` was given.
        """
        step = _Step(self.max_step_tokens, now)
        self.arriving = False
        preempted_before = self.preemptions
        decoding = [s for s in self.running if s.remaining == 1]
        prefilling = [s for s in self.running if s.remaining > 1]
        for sequence in [*decoding, *prefilling]:
            if step.budget > 0 and sequence.state is State.RUNNING:
                self._continue(sequence, step)
        if self.preemptions == preempted_before or not step.counts:
            self._admit(step)
        return [Share(sequence, count) for sequence, count in step.counts.items()]

    def commit(self, share: Share) -> None:
        """Note that a share has been computed."""
        sequence = share.sequence
        self.blocks.commit(sequence, sequence.computed + share.count)

    def finish(self, sequence: Sequence, sound: bool = True) -> None:
        """Take a sequence out, whatever its state; its blocks are free at once.

        Args:
            sequence: to be taken out.
            sound: False if what it has computed must not be read by others.
        """
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        self.parked.pop(sequence, None)
        sequence.state = State.FINISHED
        self.most = min(self.max_sequences, self.most + 1)
        if sound:
            self.blocks.release(sequence)
        else:
            self.blocks.discard(sequence)

    def give_way(self, sequences: Items[Sequence]) -> None:
        """Preempt running sequences for which a step had no room; fewer then run for a while.

        They are the first in the queue then, in order of arrival.
        """
        self.most = max(1, min(self.most, self.holders) // 2)
        for sequence in sorted(sequences, key=lambda sequence: sequence.arrival, reverse=True):
            self._preempt(sequence)

    @property
    def holders(self) -> int:
        """Sequences that hold blocks."""
        return len(self.running) + len(self.parked)

    def _continue(self, sequence: Sequence, step: "_Step") -> None:
        count = min(sequence.remaining, step.budget)
        while not self.blocks.extend(sequence, sequence.computed + count):
            victim = self._victim(step.now)
            self._preempt(victim)
            step.drop(victim)
            if victim is sequence:
                return
        step.add(sequence, count)

    def _victim(self, now: float) -> Sequence:
        """Who has to give its blocks up: one whose caller sleeps, else the latest arrival."""
        holders = (*self.running[-1:], *self.parked)
        return self._stale(now) or max(holders, key=lambda sequence: sequence.arrival)

    def _stale(self, now: float) -> Sequence | None:
        """The sequence that has been parked the longest, if that is too long."""
        for sequence, since in self.parked.items():
            return sequence if now - since >= PATIENCE else None
        return None

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        if sequence.state is State.PARKED:
            del self.parked[sequence]
        else:
            self.running.remove(sequence)
            sequence.state = State.WAITING
            self.waiting.appendleft(sequence)

    def _admit(self, step: "_Step") -> None:
        held: list[Sequence] = []
        while self.waiting and step.budget > 0:
            sequence = self.waiting.popleft()
            if self._awaits_leader(sequence):
                held.append(sequence)
                continue
            if not self._enter(sequence, step):
                self.waiting.appendleft(sequence)
                break
            if sequence.preemptions == 0:
                sequence.cached = sequence.computed
            sequence.state = State.RUNNING
            self._insert(sequence)
            if self.blocks.restoring:
                self.arriving = bool(step.counts)
            if not self.arriving:
                step.add(sequence, min(sequence.remaining, step.budget))
            if self.blocks.restoring:  # whoever comes next might read the same blocks
                break
        self.waiting.extendleft(reversed(held))

    def _enter(self, sequence: Sequence, step: "_Step") -> bool:
        """Find a place and blocks for a waiting sequence, if need be those of stale ones."""
        while self.holders >= self.most or not self.blocks.admit(sequence, step.budget):
            stale = self._stale(step.now)
            if stale is None:
                return False
            self._preempt(stale)
        return True

    def _awaits_leader(self, sequence: Sequence) -> bool:
        """Whether waiting lets this sequence reuse the prompt that its leader is computing."""
        leader = sequence.leader
        return (
            self.blocks.prefix_cache
            and leader is not None
            and leader.state is not State.FINISHED
            and leader.computed < leader.prompt_length
        )

    def _insert(self, sequence: Sequence) -> None:
        """Keep `running` in order of arrival, so that the latest arrival is the first victim."""
        index = len(self.running)
        while index and self.running[index - 1].arrival > sequence.arrival:
            index -= 1
        self.running.insert(index, sequence)


class _Step:
    """Shares chosen so far and the tokens that may still be given out."""

    def __init__(self, budget: int, now: float) -> None:
        self.budget = budget
        self.now = now
        self.counts: dict[Sequence, int] = {}

    def add(self, sequence: Sequence, count: int) -> None:
        self.counts[sequence] = count
        self.budget -= count

    def drop(self, sequence: Sequence) -> None:
        self.budget += self.counts.pop(sequence, 0)
