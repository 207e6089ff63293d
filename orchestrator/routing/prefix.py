"""Which worker has probably computed the beginning of a prompt. Pure.

Workers keep the keys and values of prompts they have seen; the gateway only remembers whom it sent
a prompt to, by chained hashes of its first blocks of bytes. What it gives up: knowing what a worker
has evicted since. A wrong guess costs a prefill, never an answer.
"""

from collections import OrderedDict
from collections.abc import Iterator

BLOCK_BYTES = 256
"""About 64 tokens; a shorter common beginning is not worth a detour."""
MAX_BLOCKS = 16


class PrefixIndex:
    """The last worker of each prompt beginning.

    Args:
        capacity: beginnings to remember; the least recently used one is forgotten first.
    """

    def __init__(self, capacity: int = 16_384) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[int, str] = OrderedDict()

    def find(self, prompt: bytes) -> str:
        """The worker with the longest known beginning of the prompt; empty if there is none."""
        for key in reversed(list(_keys(prompt))):
            worker = self._workers.get(key)
            if worker is not None:
                self._workers.move_to_end(key)
                return worker
        return ""

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
