"""Scratch memory of `prefill_wide`, by shapes alone: also for plans made without a card."""

from typing import NamedTuple

BLOCK = 128
"""Queries of a tile."""
TILE = 64
"""Keys of a step."""
DIM = 512
"""Numbers of a head."""
FEW = 64
"""Queries from which on `prefill_wide` is used; fewer leave most of a tile empty."""
SPAN = 33 * TILE
"""Keys whose probabilities are written down; a multiple of three steps."""
MOST_PROCESSORS = 132
"""Of Hopper's cards the largest have that many; there are no more programs at any rate."""
PAIRS_A_STEP = BLOCK * TILE // 2


class Scratch(NamedTuple):
    """How many programs there are, and what all of them together write down, in 4 bytes each."""

    programs: int
    span: int
    """Keys at a time."""
    pairs: int
    """Of probabilities."""
    marks: int
    """Maxima."""
    sums: int

    @classmethod
    def of(
        cls, queries: int, heads: int, keys: int, processors: int = MOST_PROCESSORS
    ) -> "Scratch":
        """Of queries that see `keys` keys at most. None of it shrinks if there are more of these.

        At most 108 MB: 819,712 bytes for each of 132 programs.
        """
        programs = min(processors, MOST_PROCESSORS, -(-queries // BLOCK) * heads)
        steps = -(-min(SPAN, keys) // TILE)
        pairs, marks = programs * steps * PAIRS_A_STEP, programs * steps * BLOCK
        return cls(programs, steps * TILE, pairs, marks, programs * BLOCK * DIM)

    @property
    def bytes(self) -> int:
        """Of device memory."""
        return 4 * (self.pairs + self.marks + self.sums)
