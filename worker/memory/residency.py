"""Which layers stay on the device and which are streamed through slots: a pure function of bytes.

Of layers that are all read once a step, it does not matter by bytes which ones are streamed; what
matters is that each copy has computing to hide behind, so they are spread evenly over the depth.
Pinning a set and streaming the rest is within one layer of what knowing the future would bring; an
LRU cache would hit nothing (research: Belady on a cyclic scan).

Layers may be kept in a shorter code, those that stay too: then each of their modules is decoded
into one working slot just before it runs. All layers or none, so that one slot is enough. Their
blocks come in parts, one for each module, and a part's place in a slot is free once that module is
decoded: while the later ones are, the earlier ones of the next layer arrive. Parts lie at the same
places in a slot whatever the layer, so each has room for the largest one that comes there.

What it gave up: parts of layers that stay; for single experts see `experts/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

LINK_COST = 40
"""Bytes that a GPU's memory moves while the link from the host moves one: 34 to 54 on an H100, 60
on an A100. It decides where hardly anything is streamed and decoding would take longer than that;
elsewhere only what is copied counts."""


@dataclass(frozen=True, slots=True)
class Residency:
    """Where the large weights of each layer are.

    The streamed layer number i in order always uses slot i mod `slots`: kernels and CUDA graphs see
    fixed addresses. No slot has a single layer, which would better stay.
    """

    blocks: tuple[int, ...]
    """Bytes of each layer of the model, as it is kept."""
    streamed: tuple[int, ...] = ()
    """Layers that come from the host at every step, ascending."""
    slots: int = 0
    working: int = 0
    """Bytes of the slot that modules are decoded into and run from; 0 if layers are kept plain."""
    parts: tuple[tuple[int, ...], ...] = ()
    """Bytes of each layer's parts, in the order in which they are used, 0 of those that other
    layers have; empty if each layer is one."""

    def parts_of(self, layer: int) -> tuple[int, ...]:
        """Bytes of the parts that a layer's block consists of."""
        return self.parts[layer] if self.parts else (self.blocks[layer],)

    @property
    def slot_parts(self) -> tuple[int, ...]:
        """Bytes of a slot by its parts, which lie one behind the other: the largest of each."""
        return tuple(map(max, zip(*map(self.parts_of, self.streamed), strict=True)))

    @property
    def slot_bytes(self) -> int:
        """Of one slot: the largest streamed layer, or more where layers differ in their parts."""
        return sum(self.slot_parts)

    @property
    def bytes(self) -> int:
        """On the device: layers that stay, and slots."""
        return self.stays + self.slots * self.slot_bytes + self.working

    @property
    def stays(self) -> int:
        """Of layers that stay."""
        return sum(self.blocks) - self.copied

    @property
    def copied(self) -> int:
        """Bytes that are copied at every step, which is what lies on the host.

        By shapes: of codes whose end is without use less is kept there and copied.
        """
        return sum(self.blocks[layer] for layer in self.streamed)

    def next(self, position: int) -> int:
        """Who follows in a slot: the position among the streamed layers, after the last the first.

        Copies are begun in this order, each when the layer before it in the slot has run, or of
        each part when that is decoded.
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


def choose_coded(
    blocks: Sequence[int], coded: Sequence[Sequence[int]], working: int, room: int, ahead: int
) -> Residency | None:
    """The same of layers that are kept coded; None as well if no code makes them shorter.

    There are `ahead - 1` slots, one at least: parts of the next layer come into that of a layer
    that runs.

    Args:
        blocks: bytes of each layer.
        coded: bytes of the code of each layer's modules.
        working: bytes of the largest module, which runs from the working slot.
        room: bytes for layers and slots, the working one too.
        ahead: as for `choose`.
    """
    if not _shorter(coded, blocks):
        return None
    candidates = _coded_candidates(coded, working, ahead)
    return next((each for each in candidates if each.bytes <= room), None)


def choose_cheaper(
    blocks: Sequence[int],
    coded: Sequence[Sequence[int]],
    working: int,
    room: int,
    ahead: int,
    read: float,
) -> Residency | None:
    """Plain layers or coded ones, whichever a step of one token needs less time for.

    Of all `blocks` it reads `read` bytes, which is less where there are experts. For the others see
    `choose_coded`.
    """
    either = choose(blocks, room, ahead), choose_coded(blocks, coded, working, room, ahead)
    fitting = [each for each in either if each is not None]
    return min(fitting, key=lambda each: _cost(each, sum(blocks), ahead, read), default=None)


def least(blocks: Sequence[int], ahead: int) -> int:
    """The fewest bytes that `choose` can do with."""
    return min(each.bytes for each in _candidates(tuple(blocks), ahead))


def least_coded(coded: Sequence[Sequence[int]], working: int, ahead: int) -> int:
    """The fewest bytes that `choose_coded` can do with, if codes make layers shorter."""
    return min(each.bytes for each in _coded_candidates(coded, working, ahead))


def least_of_either(
    blocks: Sequence[int], coded: Sequence[Sequence[int]], working: int, ahead: int
) -> int:
    """The fewest bytes that `choose_cheaper` can do with."""
    plain = least(blocks, ahead)
    return min(plain, least_coded(coded, working, ahead)) if _shorter(coded, blocks) else plain


def _shorter(coded: Sequence[Sequence[int]], blocks: Sequence[int]) -> bool:
    return sum(map(sum, coded)) < sum(blocks)


def _cost(residency: Residency, plain: int, ahead: int, read: float) -> float:
    """Of a step that reads so many bytes of weights, in bytes of the device's memory.

    Where layers are coded it reads all codes first, and writes the `plain` bytes that they hold.
    """
    moved = read + (sum(residency.blocks) + plain if residency.working else 0)
    copied = LINK_COST * residency.copied
    return max(moved, copied) if ahead else moved + copied


def _candidates(blocks: tuple[int, ...], ahead: int) -> list[Residency]:
    """All layers resident, then two streamed, and so on."""
    found = [Residency(blocks)]
    for count in range(2, len(blocks) + 1):
        slots = min(ahead + 1, count // 2)
        found.append(Residency(blocks, _spread(count, len(blocks)), slots))
    return found


def _coded_candidates(coded: Sequence[Sequence[int]], working: int, ahead: int) -> list[Residency]:
    """The same of coded layers, which come in parts."""
    count = max(map(len, coded))
    parts = tuple((*own, *[0] * (count - len(own))) for own in coded)
    found = _candidates(tuple(map(sum, parts)), max(0, ahead - 2))
    return [replace(each, working=working, parts=parts) for each in found]


def _spread(count: int, layers: int) -> tuple[int, ...]:
    """So many of the layers, as evenly as can be, also from the last to the first."""
    return tuple(index * layers // count for index in range(count))
