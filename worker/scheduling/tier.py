"""Which blocks of the KV cache lie in host memory. No tensors here.

The second tier of the prefix cache: what a pool of the device forgets is kept here, by the same
hashes, and comes back when a prompt needs it. So a sequence that was preempted, or sat idle until
others needed its place, is not computed again but for its last block, and neither is a prompt that
was read long ago. The least recently used goes first. What it gave up: half-filled blocks, and in
layers with a window all that lies behind it, but for the window at the prompt's end: there a prompt
that only begins as another one did is computed anew.
"""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moves:
    """Copies of one cache group, to be made before the next step: first all to the host."""

    spilled: tuple[tuple[int, int], ...]
    """(block, slot), each slot once: they may be made in any order"""
    restored: tuple[tuple[int, int], ...]
    """(slot, block)"""


@dataclass(frozen=True, slots=True)
class TierUse:
    """How full the host's tier of a pool is, in blocks, and what has moved since the start."""

    blocks: int
    used: int
    spilled: int
    restored: int


class HostPool:
    """Slots of one cache group, known by what they hold."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.spilled = self.restored = 0
        self._slot: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(reversed(range(slots)))
        self._spills: dict[int, int] = {}  # by slot: the last block that goes there counts
        self._restores: dict[int, int] = {}  # by block
        self._claimed: set[int] = set()  # slots about to be read

    @property
    def restoring(self) -> bool:
        """Whether blocks are on their way back."""
        return bool(self._restores)

    def holds(self, content: bytes) -> bool:
        """Whether this content is here."""
        return content in self._slot

    def spill(self, block: int, content: bytes) -> None:
        """Have a block copied here before the next step, if its content is not here already."""
        if content in self._slot:
            self._slot.move_to_end(content)
            return
        slot = self._room()
        if slot is not None:
            self._slot[content] = slot
            self._spills[slot] = block

    def claim(self, content: bytes) -> int:
        """The slot with this content, which stays there until the moves are made."""
        self._slot.move_to_end(content)
        self._claimed.add(self._slot[content])
        return self._slot[content]

    def restore(self, slot: int, block: int) -> None:
        """Have a slot copied into a block before the next step."""
        self._restores[block] = slot

    def abandon(self, block: int) -> None:
        """The block is taken for something else: what was to come into it need not."""
        self._restores.pop(block, None)

    def forget(self, content: bytes) -> None:
        """Let nobody find this content again."""
        slot = self._slot.pop(content, None)
        if slot is not None:
            self._free.append(slot)

    def take_moves(self) -> Moves:
        """What is to be copied before the next step; told once."""
        restored = tuple((slot, block) for block, slot in self._restores.items())
        moves = Moves(tuple((block, slot) for slot, block in self._spills.items()), restored)
        self.spilled += len(moves.spilled)
        self.restored += len(moves.restored)
        self._spills, self._restores = {}, {}
        self._claimed.clear()
        return moves

    def use(self) -> TierUse:
        """How full it is."""
        return TierUse(self.slots, len(self._slot), self.spilled, self.restored)

    def _room(self) -> int | None:
        """A slot that nobody is about to read; that of the least recently used, if none is free."""
        for place in range(len(self._free) - 1, -1, -1):
            if self._free[place] not in self._claimed:
                return self._free.pop(place)
        for content, slot in self._slot.items():
            if slot not in self._claimed:
                del self._slot[content]
                return slot
        return None
