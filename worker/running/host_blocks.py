"""Blocks of keys and values in locked host memory, and their copies to and from the device.

A block lies there whole, all layers of its group together, and blocks that lie side by side are
copied together, so that a copy is large enough for the link's full rate; on the device a kernel
collects a buffer from the layers' tensors, or shares it out to them. Copies to the host are made by
the stream that computes, as the next step writes over what they read. Copies back have two streams
of their own and run beside a step that does not need them: while one shares out, the other copies.
No copy takes memory: where that has run out, a step may fail, but what lies where stays known. What
it gave up: narrow numbers, whose second digits lie elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import KernelInputError
from ...kernels.residence.fetch import Fetcher
from ..errors import ConfigError
from ..memory.device import host_memory
from ..memory.host import HostBlock, release
from ..memory.plan import gib
from ..model.config import CacheGroup
from ..scheduling.sizing import HOST_BUFFER, LANES
from ..scheduling.tier import Moves
from .caches import Tensors


class HostBlocks:
    """So many blocks of each group, for what has no room in `tensors` on the device.

    Raises ConfigError if the host does not have the memory, or does not lock it.
    """

    def __init__(
        self,
        tensors: Tensors,
        groups: Sequence[CacheGroup],
        slots: Sequence[int],
        device: torch.device,
    ) -> None:
        self._device = device
        parts = [
            [_rows(own) for layer in group.layers for own in tensors[layer]] for group in groups
        ]
        sizes = [sum(own.shape[1] for own in group) for group in parts]
        room = max(HOST_BUFFER, LANES * max(sizes))
        buffer = torch.empty(room, dtype=torch.uint8, device=device)
        on_card = device.type == "cuda"
        self._lanes = [torch.cuda.Stream(device) for _ in range(LANES)] if on_card else []
        self._arrived: torch.cuda.Event | None = None
        needed, there = sum(map(mul, slots, sizes)), host_memory()
        if needed > there:
            raise ConfigError(
                f"kv_host_gib asks for {gib(needed)}, but the host has {gib(there)} free: lower it"
            )
        self._tiers: list[_Tier] = []
        try:
            for group, size, count in zip(parts, sizes, slots, strict=True):
                self._tiers.append(_Tier(group, size, count, buffer))
        except ConfigError:
            self.close()
            raise

    @torch.inference_mode()
    def exchange(self, moves: Sequence[Moves], wait: bool) -> None:
        """Make the copies that are due before a step; it needs what comes back if it is to `wait`.

        The step after it waits in any case.
        """
        self._arrive()
        for tier, own in zip(self._tiers, moves, strict=True):
            tier.spill(own.spilled)
        if not any(own.restored for own in moves):
            return
        if not self._lanes:
            self._restore(moves)
            return
        self._lanes[0].wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._lanes[0]):
            self._restore(moves)
            self._arrived = self._lanes[0].record_event()
        if wait:
            self._arrive()

    def close(self) -> None:
        """Unlock and release the host's memory."""
        release((tier.memory for tier in self._tiers), self._device)
        self._tiers.clear()

    def _restore(self, moves: Sequence[Moves]) -> None:
        # All lists first: a copy from memory that is not locked waits for all copies before it.
        told = [tier.listed(own.restored) for tier, own in zip(self._tiers, moves, strict=True)]
        for lane in self._lanes[1:]:
            lane.wait_stream(self._lanes[0])
        for tier, pairs in zip(self._tiers, told, strict=True):
            tier.restore(pairs, self._lanes)
        for lane in self._lanes[1:]:
            self._lanes[0].wait_stream(lane)

    def _arrive(self) -> None:
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
            self._arrived = None


@dataclass(frozen=True, slots=True)
class _Batch:
    """What goes through a lane of the buffer at once."""

    lane: int
    rows: Tensor
    """The part of the buffer, [n, bytes]."""
    runs: list[tuple[int, int, int]]
    """First row, first slot on the host, how many."""
    blocks: list[int]
    listed: Tensor
    """For `Fetcher`."""


class _Tier:
    """The host's blocks of one group; `parts` are [blocks, bytes] of each of its tensors."""

    def __init__(self, parts: Sequence[Tensor], size: int, slots: int, buffer: Tensor) -> None:
        self._parts = parts
        self._offsets = [0, *accumulate(own.shape[1] for own in parts)][:-1]
        self._each = len(buffer) // LANES // size
        """Blocks in a lane."""
        self._buffer = buffer[: LANES * self._each * size].view(-1, size)
        width = -(-(1 + 2 * self._each) // 4) * 4  # so that all begin at multiples of 16 bytes
        most = -(-len(parts[0]) // self._each)
        self._lists = torch.zeros(most, width, dtype=torch.int32, device=buffer.device)
        self._fetcher = _fetcher(self._buffer, parts, self._offsets) if buffer.is_cuda else None
        self.memory = HostBlock(
            slots * size, "keys and values (kv_host_gib)", "or lower kv_host_gib"
        )
        self.memory.memory.zero_()
        if buffer.is_cuda:
            self.memory.lock()
        self._slots = self.memory.memory.view(slots, size)

    def spill(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (block, slot) to the host."""
        for batch in self._batches(self.listed([(slot, block) for block, slot in pairs])):
            if self._fetcher is not None:
                self._fetcher.collect(batch.listed)
            else:
                for own, place in zip(self._parts, self._offsets, strict=True):
                    batch.rows[:, place : place + own.shape[1]] = own[batch.blocks]
            for row, slot, count in batch.runs:
                rows = batch.rows[row : row + count]
                self._slots[slot : slot + count].copy_(rows, non_blocking=True)

    def restore(self, pairs: Sequence[tuple[int, int]], lanes: Sequence[Any]) -> None:
        """Copies (slot, block) to the device, on these streams; they are the last `listed`."""
        for batch in self._batches(pairs):
            with torch.cuda.stream(lanes[batch.lane]) if lanes else nullcontext():
                for row, slot, count in batch.runs:
                    rows = batch.rows[row : row + count]
                    rows.copy_(self._slots[slot : slot + count], non_blocking=True)
                if self._fetcher is not None:
                    self._fetcher.fetch(batch.listed)
                    continue
                for own, place in zip(self._parts, self._offsets, strict=True):
                    own[batch.blocks] = batch.rows[:, place : place + own.shape[1]]

    def listed(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(slot, block) in the order of slots; for the device, a list of each batch of them."""
        ordered = sorted(pairs)
        if self._fetcher is not None and ordered:
            each, count = self._each, -(-len(ordered) // self._each)
            rows = torch.arange(count * each, dtype=torch.int32) % (LANES * each)
            blocks = torch.zeros(count * each, dtype=torch.int32)
            blocks[: len(ordered)] = torch.tensor([block for _, block in ordered])
            lists = torch.zeros(count, self._lists.shape[1], dtype=torch.int32)
            lists[:, 0] = (len(ordered) - torch.arange(0, count * each, each)).clamp(max=each)
            lists[:, 1 : 1 + 2 * each] = torch.cat(
                (rows.view(count, -1), blocks.view(count, -1)), 1
            )
            self._lists[:count] = lists
        return ordered

    def _batches(self, ordered: Sequence[tuple[int, int]]) -> Iterator[_Batch]:
        """As many at a time as a lane holds."""
        each = self._each
        for number, at in enumerate(range(0, len(ordered), each)):
            own, lane = ordered[at : at + each], number % LANES
            rows = self._buffer[lane * each : lane * each + len(own)]
            runs, blocks = _runs([slot for slot, _ in own]), [block for _, block in own]
            yield _Batch(lane, rows, runs, blocks, self._lists[number, : 1 + 2 * each])


def _fetcher(buffer: Tensor, parts: Sequence[Tensor], offsets: Sequence[int]) -> Fetcher:
    places = torch.arange(len(buffer), dtype=torch.int64, device=buffer.device)
    try:
        return Fetcher(buffer.data_ptr() + places * buffer.shape[1], parts, offsets)
    except KernelInputError as error:
        raise ConfigError(f"kv_host_gib: {error}; raise block_size, or leave it out") from error


def _runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """(index, slot, length) of each run of slots that lie side by side."""
    runs: list[tuple[int, int, int]] = []
    for index, slot in enumerate(slots):
        if runs and slot == sum(runs[-1][1:]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((index, slot, 1))
    return runs


def _rows(tensor: Tensor) -> Tensor:
    """The bytes of each block, uint8 [blocks, n]."""
    return tensor.flatten(1).view(torch.uint8)
