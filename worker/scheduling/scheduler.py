"""Who runs in the next step, and with how many tokens: continuous batching with chunked prefill.

Each step has a budget of tokens. Decoding sequences come first, one token each; what is left goes
to prompts in order of arrival, cut into chunks. If blocks run out, the latest arrival gives its
blocks up and is computed again later (recompute preemption, vLLM, SOSP 2023, section 4.5).
"""

from collections import deque
from dataclasses import dataclass

from .cache import BlockManager
from .sequence import Sequence, State


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
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Share]:
        """Choose the next step; empty only if nothing waits or runs."""
        step = _Step(self.max_step_tokens)
        preempted_before = self.preemptions
        decoding = [s for s in self.running if s.remaining == 1]
        prefilling = [s for s in self.running if s.remaining > 1]
        for sequence in [*decoding, *prefilling]:
            if step.budget > 0 and sequence.state is State.RUNNING:
                self._continue(sequence, step)
        if self.preemptions == preempted_before:
            self._admit(step)
        return [Share(sequence, count) for sequence, count in step.counts.items()]

    def commit(self, share: Share) -> None:
        """Note that a share has been computed."""
        sequence = share.sequence
        self.blocks.commit(sequence, sequence.computed + share.count)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state; its blocks are free at once."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED
        self.blocks.release(sequence)

    def _continue(self, sequence: Sequence, step: "_Step") -> None:
        count = min(sequence.remaining, step.budget)
        while not self.blocks.extend(sequence, sequence.computed + count):
            victim = self.running[-1]
            self._preempt(victim)
            step.drop(victim)
            if victim is sequence:
                return
        step.add(sequence, count)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        sequence.state = State.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, step: "_Step") -> None:
        held: list[Sequence] = []
        while self.waiting and len(self.running) < self.max_sequences and step.budget > 0:
            sequence = self.waiting.popleft()
            if self._awaits_leader(sequence):
                held.append(sequence)
                continue
            if not self.blocks.admit(sequence, step.budget):
                self.waiting.appendleft(sequence)
                break
            if sequence.preemptions == 0:
                sequence.cached = sequence.computed
            sequence.state = State.RUNNING
            self._insert(sequence)
            step.add(sequence, min(sequence.remaining, step.budget))
        self.waiting.extendleft(reversed(held))

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

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.counts: dict[Sequence, int] = {}

    def add(self, sequence: Sequence, count: int) -> None:
        self.counts[sequence] = count
        self.budget -= count

    def drop(self, sequence: Sequence) -> None:
        self.budget += self.counts.pop(sequence, 0)
