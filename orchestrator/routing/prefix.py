"""Which worker has probably computed the beginning of a prompt. Pure.

Workers keep the keys and values of prompts they have seen; the gateway only remembers whom it sent
a prompt to, by chained hashes of its first blocks of bytes. What a worker has evicted since it does
not know, so it learns from the answers how much of what it expected was there, and expects less
where beginnings are more than the workers can hold. A wrong guess costs a prefill, never an answer.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK_BYTES = 256
"""A shorter common beginning is not worth a detour."""
BLOCK_TOKENS = 64
"""About as many tokens."""
MAX_BLOCKS = 16
LEARNING = 0.05
"""Weight of the newest answer in the fraction of expected tokens that are there."""


@dataclass(frozen=True, slots=True)
class Known:
    """The beginning of a prompt that was seen before."""

    worker: str = ""
    """Who computed it last; empty if nobody has."""
    tokens: int = 0
    """About how many it has."""
    expected: int = 0
    """How many of those the worker holds still, as a rule."""


NOTHING = Known()


class PrefixIndex:
    """The last worker of each prompt beginning.

    Args:
        capacity: beginnings to remember; the least recently used one is forgotten first.
    """

    def __init__(self, capacity: int = 16_384) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[int, str] = OrderedDict()
        self._held = 1.0
        """The fraction of known tokens that workers turned out to hold."""

    def find(self, prompt: bytes) -> Known:
        """The longest known beginning of the prompt."""
        keys = list(_keys(prompt))
        for blocks in range(len(keys), 0, -1):
            key = keys[blocks - 1]
            worker = self._workers.get(key)
            if worker is not None:
                self._workers.move_to_end(key)
                tokens = blocks * BLOCK_TOKENS
                return Known(worker, tokens, int(tokens * self._held))
        return NOTHING

    def learn(self, known: Known, cached: int) -> None:
        """So many tokens of a prompt with that beginning were there when its worker began."""
        self._held += LEARNING * (min(1.0, cached / known.tokens) - self._held)

    def note(self, prompt: bytes, worker: str) -> None:
        """The prompt goes to that worker."""
        for key in _keys(prompt):
            self._workers[key] = worker
            self._workers.move_to_end(key)
        while len(self._workers) > self._capacity:
            self._workers.popitem(last=False)


def _keys(prompt: bytes) -> Iterator[int]:
    """One hash for each of the first whole blocks, each over everything before it too."""
    key = 0
    for start in range(0, min(len(prompt) // BLOCK_BYTES, MAX_BLOCKS) * BLOCK_BYTES, BLOCK_BYTES):
        key = hash((key, prompt[start : start + BLOCK_BYTES]))
        yield key
