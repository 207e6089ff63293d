"""Which layers are streamed: laws that hold for any sizes, and the cases one can count by hand."""

from hypothesis import given
from hypothesis import strategies as st

from conclave.worker.memory.residency import (
    LINK_COST,
    Residency,
    choose,
    choose_cheaper,
    choose_coded,
    least,
    least_coded,
    least_of_either,
)

BLOCKS = st.lists(st.integers(1, 1000), min_size=1, max_size=70)


@given(BLOCKS, st.integers(0, 60_000), st.integers(0, 8))
def test_it_fits_and_every_slot_is_shared(blocks: list[int], room: int, ahead: int) -> None:
    found = choose(blocks, room, ahead)
    assert (found is None) == (room < least(blocks, ahead))
    if found is None:
        return
    assert found.bytes <= room and found.blocks == tuple(blocks)
    assert list(found.streamed) == sorted(set(found.streamed))
    assert found.slots <= ahead + 1 and len(found.streamed) >= 2 * found.slots
    assert bool(found.streamed) == (sum(blocks) > room)


@given(BLOCKS, st.integers(0, 60_000), st.integers(0, 8))
def test_each_follows_another_in_its_slot(blocks: list[int], room: int, ahead: int) -> None:
    found = choose(blocks, room, ahead)
    if found is None or not found.streamed:
        return
    positions = range(len(found.streamed))
    assert sorted(map(found.next, positions)) == [*positions]
    assert all(found.next(each) % found.slots == each % found.slots for each in positions)
    assert all(found.next(each) != each for each in positions)


def test_what_lacks_room_is_streamed_and_no_more() -> None:
    found = choose([10] * 60, 500, 2)
    assert found is not None
    assert (len(found.streamed), found.slots, found.copied, found.bytes) == (13, 3, 130, 500)
    assert found.streamed == (0, 4, 9, 13, 18, 23, 27, 32, 36, 41, 46, 50, 55)
    # On demand there is one slot, so fewer layers have to go.
    on_demand = choose([10] * 60, 500, 0)
    assert on_demand is not None
    assert (len(on_demand.streamed), on_demand.slots) == (11, 1)
    # Where a single layer lacks room, two take turns in its place.
    assert choose([10] * 60, 590, 2) == Residency((10,) * 60, (0, 30), 1)


def test_a_slot_holds_the_largest_layer() -> None:
    found = choose([10, 30, 10, 10], 49, 0)
    assert found is not None
    assert found.streamed == (0, 1, 2) and found.slot_bytes == 30 and found.bytes == 40
    assert least([10, 30, 10, 10], 0) == 30 and choose([10, 30, 10, 10], 29, 0) is None


def test_coded_layers_that_one_can_count() -> None:
    blocks, coded = [10] * 60, [(5, 3)] * 60
    found = choose_coded(blocks, coded, 4, 400, 2)
    # 4 to run from and a slot of 8 leave 388: 48 layers stay.
    assert found is not None and found.blocks == (8,) * 60
    assert (len(found.streamed), found.slots, found.working) == (12, 1, 4)
    assert (found.copied, found.stays, found.bytes) == (96, 384, 396)
    assert found.slot_parts == (5, 3) == found.parts_of(7)
    plain = choose(blocks, 400, 2)
    assert plain is not None and plain.copied == 230
    assert choose_cheaper(blocks, coded, 4, 400, 2, 600) == found
    # Room for modules as large as a layer would let one layer fewer stay.
    large = choose_coded(blocks, coded, 10, 400, 2)
    assert large is not None and (large.working, large.copied) == (10, 104)
    depths = [choose_coded(blocks, coded, 4, 400, ahead) for ahead in range(5)]
    assert [each.slots for each in depths if each] == [1, 1, 1, 2, 3]
    # All stay once they are coded: nothing is copied.
    whole = choose_coded(blocks, coded, 4, 484, 2)
    assert whole is not None and (whole.streamed, whole.slots, whole.bytes) == ((), 0, 484)
    assert least_of_either(blocks, coded, 4, 2) == least_coded(coded, 4, 2) == 4 + 8
    assert least_of_either(blocks, blocks_of_one(blocks), 4, 2) == least(blocks, 2)


def blocks_of_one(blocks: list[int]) -> list[tuple[int, ...]]:
    """Each of a single part that is not shorter."""
    return [(size,) for size in blocks]


def test_a_slot_has_room_for_the_largest_of_each_part() -> None:
    coded = [(6, 2), (2, 6, 1), (3, 3)]
    found = choose_coded([20] * 3, coded, 0, 13, 2)
    assert found is not None and found.streamed == (0, 1, 2)
    assert found.parts == ((6, 2, 0), (2, 6, 1), (3, 3, 0)) and found.blocks == (8, 9, 6)
    assert found.slot_parts == (6, 6, 1) and found.slot_bytes == found.bytes == 13
    assert choose_coded([20] * 3, coded, 0, 12, 2) is None and least_coded(coded, 0, 2) == 13
    # Where one of them stays, the slot needs only what the others have.
    more = choose_coded([20] * 3, [(6, 2), (4, 4), (2, 6)], 0, 18, 2)
    assert more is not None and more.streamed == (0, 1)
    assert more.slot_parts == (6, 4) and more.bytes == 8 + 10


def test_decoding_must_be_worth_it() -> None:
    blocks, coded = [10] * 60, [(5, 3)] * 60
    # Two layers are copied while 600 bytes are read: so they are as soon there as all are decoded.
    near = choose_cheaper(blocks, coded, 4, 590, 2, 600)
    assert near is not None and not near.working and near.copied == 20
    assert LINK_COST * near.copied < 600 + 480 + 600
    few = choose_cheaper(blocks, coded, 4, 550, 2, 600)
    assert few is not None and few.working and not few.streamed
    # Where a token meets few experts, decoding is most of what a step does.
    for read, coded_is_cheaper in ((600, False), (60, True)):
        each = choose_cheaper(blocks, coded, 4, 580, 2, read)
        assert each is not None and (each.working > 0) == coded_is_cheaper
    same = blocks_of_one(blocks)
    assert choose_coded(blocks, same, 4, 400, 2) is None
    assert choose_cheaper(blocks, same, 4, 400, 2, 600) == choose(blocks, 400, 2)


@given(BLOCKS, st.floats(0.5, 1), st.floats(0.2, 1), st.integers(0, 60_000), st.integers(0, 8))
def test_either_fits_if_one_does(
    blocks: list[int], share: float, part: float, room: int, ahead: int
) -> None:
    sizes = [max(2, int(share * block)) for block in blocks]
    coded = [(size // 3, size - size // 3) for size in sizes]
    working = max(1, int(part * max(blocks)))
    found = choose_cheaper(blocks, coded, working, room, ahead, sum(blocks))
    assert (found is None) == (room < least_of_either(blocks, coded, working, ahead))
    if found is None:
        return
    assert found.bytes <= room
    assert found.blocks == tuple(sizes if found.working else blocks)
    assert found.slot_bytes >= max((found.blocks[layer] for layer in found.streamed), default=0)
    assert found.working in (0, working)
    plain = choose(blocks, room, ahead)
    if ahead and plain is not None and LINK_COST * plain.copied > 3 * sum(blocks):
        assert found.copied <= plain.copied
