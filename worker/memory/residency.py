"""Which layers stay on the device and which are streamed through slots: a pure function of bytes.

Of layers that are all read once a step, it does not matter by bytes which ones are streamed; what
matters is that each copy has computing to hide behind, so they are spread evenly over the depth.
Pinning a set and streaming the rest is within one layer of what knowing the future would bring; an
LRU cache would hit nothing (research: Belady on a cyclic scan). What it gave up: parts of layers;
for single experts see `experts/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Residency:
    """Where the large weights of each layer are.

    The streamed layer number i in order always uses slot i mod `slots`: kernels and CUDA graphs see
    fixed addresses. No slot has a single layer, which would better stay.
    """

    blocks: tuple[int, ...]
    """Bytes of each layer of the model."""
    streamed: tuple[int, ...] = ()
    """Layers that come from the host at every step, ascending."""
    slots: int = 0

    @property
    def slot_bytes(self) -> int:
        """Of one slot: the largest streamed layer."""
        return max((self.blocks[layer] for layer in self.streamed), default=0)

    @property
    def bytes(self) -> int:
        """On the device: layers that stay, and slots."""
        return sum(self.blocks) - self.copied + self.slots * self.slot_bytes

    @property
    def copied(self) -> int:
        """Bytes that are copied at every step, which is what lies on the host."""
        return sum(self.blocks[layer] for layer in self.streamed)

    def next(self, position: int) -> int:
        """Who follows in a slot: the position among the streamed layers, after the last the first.

        Copies are begun in this order, each when the layer before it in the slot has run.
        """
        after = position + self.slots
        return after if after < len(self.streamed) else position % self.slots


def choose(blocks: Sequence[int], room: int, ahead: int) -> Residency | None:
    """The residency that streams fewest layers in `room` bytes; None if none fits.

    Args:
        blocks: bytes of each layer.
        room: bytes for layers and slots.
        ahead: layers that are copied ahead of the one that runs, each into a slot of its own.
    """
    blocks = tuple(blocks)
    return next((each for each in _candidates(blocks, ahead) if each.bytes <= room), None)


def least(blocks: Sequence[int], ahead: int) -> int:
    """The fewest bytes that `choose` can do with."""
    return min(each.bytes for each in _candidates(tuple(blocks), ahead))


def _candidates(blocks: tuple[int, ...], ahead: int) -> list[Residency]:
    """All layers resident, then two streamed, and so on."""
    found = [Residency(blocks)]
    for count in range(2, len(blocks) + 1):
        slots = min(ahead + 1, count // 2)
        found.append(Residency(blocks, _spread(count, len(blocks)), slots))
    return found


def _spread(count: int, layers: int) -> tuple[int, ...]:
    """So many of the layers, as evenly as can be, also from the last to the first."""
    return tuple(index * layers // count for index in range(count))
