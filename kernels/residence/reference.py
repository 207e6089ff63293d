"""`claim` and `fetch` in plain Python: what runs on a CPU, and what the kernels are held to."""

from collections.abc import Sequence

from torch import Tensor

from .table import (
    AHEAD,
    EMPTY,
    HITS,
    MISSES,
    MOST_SLOTS,
    POISON,
    SCAN,
    TAKEN,
    USED,
    SlotTable,
    reused,
)


def claim(table: SlotTable, layer: int, chosen: Tensor, ahead: bool = False) -> None:
    """As `claim.claim`, of a table on a CPU."""
    slot_of, owner, used = table.slot_of.numpy(), table.owner.numpy(), table.used.numpy()
    early, worth, counts = table.early.numpy(), table.worth.numpy(), table.counts.numpy()
    table.clock.add_(int(not ahead))
    now, first = int(table.clock), layer * table.experts
    needed = [first + expert for expert in sorted(set(chosen.flatten().tolist()))]
    found = [each for each in needed if slot_of[each] >= 0]
    missing = [each for each in needed if slot_of[each] < 0]
    for each in found:
        used[slot_of[each]] = now
    part, whole = SCAN
    for each in () if ahead or whole * len(needed) > part * table.experts else needed:
        worth[each] = reused(int(worth[each]), now * table.rate)
    for each in () if ahead else found:
        counts[USED] += early[slot_of[each]]
        early[slot_of[each]] = 0
    keys = worth[owner] * MOST_SLOTS
    keys[owner < 0] = EMPTY * MOST_SLOTS
    keys += range(table.slots)
    keys[used == now] = TAKEN
    wanted = missing[: int((keys < TAKEN).sum())] if ahead else missing
    fetches = table.fetches.numpy()
    fetches[0] = len(wanted)
    for index, each in enumerate(wanted):
        slot = int(keys.argmin())
        keys[slot] = TAKEN
        if owner[slot] >= 0:
            slot_of[owner[slot]] = -1
        owner[slot], slot_of[each] = each, slot
        used[slot], early[slot] = now, int(ahead)
        fetches[1 + index], fetches[1 + table.experts + index] = each, slot
    if ahead:
        counts[AHEAD] += len(wanted)
    else:
        counts[HITS] += len(found)
        counts[MISSES] += len(missing)


def wanted(table: SlotTable) -> list[tuple[int, int]]:
    """(expert, slot) of what the last claim wants fetched."""
    count, *rest = table.fetches.tolist()
    return list(zip(rest[:count], rest[table.experts :][:count], strict=True))


def fetch(
    table: SlotTable,
    blocks: Sequence[Tensor],
    stacks: Sequence[Tensor],
    offsets: Sequence[int],
    poison: bool = False,
) -> None:
    """As `fetch.fetch`, of plain tensors.

    Args:
        table: says who is wanted where.
        blocks: of each layer, uint8 [experts, bytes].
        stacks: of each part of an expert, uint8 [slots, bytes].
        offsets: where in an expert's bytes each part begins.
        poison: fill the slots with NaN instead.
    """
    for expert, slot in wanted(table):
        own = blocks[expert // table.experts][expert % table.experts]
        for stack, offset in zip(stacks, offsets, strict=True):
            part = own[offset : offset + stack.shape[1]]
            stack[slot] = POISON if poison else part
