"""Which prompt beginnings a stub worker holds: a prefix cache of hashes alone. No clock, no I/O.

As in a real engine only full blocks are shared, each known by a hash over everything before it too,
and the least recently used one makes room. What it gives up: the blocks of running sequences are
not counted here, so that the room does not shrink under load.
"""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice


class StubCache:
    """The blocks of recent prompts.

    Args:
        blocks: that it holds at most; with 0 nothing is ever found.
        block_bytes: bytes of a prompt in a block.
    """

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._held: OrderedDict[int, None] = OrderedDict()
        """The one to go first stands first."""

    def take(self, prompt: bytes) -> int:
        """How many of the prompt's first blocks were held. From now on all of its full ones are.

        Of one prompt the last block goes first, for none is found without those before it.
        """
        keys = list(islice(self._keys(prompt), self._blocks))
        found = next((at for at, key in enumerate(keys) if key not in self._held), len(keys))
        for key in reversed(keys):
            self._held[key] = None
            self._held.move_to_end(key)
        while len(self._held) > self._blocks:
            self._held.popitem(last=False)
        return found

    def _keys(self, prompt: bytes) -> Iterator[int]:
        key, size = 0, self._block_bytes
        for end in range(size, len(prompt) + 1, size):
            key = hash((key, prompt[end - size : end]))
            yield key
