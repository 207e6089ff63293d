"""Blocks of keys and values in locked host memory, and their copies to and from the device.

A block lies there whole, all layers of its group together, so that a copy is large enough for the
link's full rate; on the device a buffer collects it from the layers' tensors. Copies to the host
are made by the stream that computes, as the next step writes over what they read. Copies back have
a stream of their own and run beside a step that does not need them. No copy takes memory: where
that has run out, a step may fail, but what lies where stays known. What it gave up: narrow numbers,
whose second digits lie elsewhere.
"""

from collections.abc import Iterator, Sequence
from operator import mul

import torch
from torch import Tensor

from ..errors import ConfigError
from ..memory.device import host_memory
from ..memory.host import HostBlock
from ..memory.plan import gib
from ..model.config import CacheGroup
from ..scheduling.sizing import HOST_BUFFER
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
        buffer = torch.empty(max(HOST_BUFFER, *sizes), dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
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
        if self._stream is None:
            self._restore(moves)
            return
        if not any(own.restored for own in moves):
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._restore(moves)
            self._arrived = self._stream.record_event()
        if wait:
            self._arrive()

    def close(self) -> None:
        """Unlock and release the host's memory."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for tier in self._tiers:
            tier.memory.close()
        self._tiers.clear()

    def _restore(self, moves: Sequence[Moves]) -> None:
        for tier, own in zip(self._tiers, moves, strict=True):
            tier.restore(own.restored)

    def _arrive(self) -> None:
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
            self._arrived = None


class _Tier:
    """The host's blocks of one group; `parts` are [blocks, bytes] of each of its tensors."""

    def __init__(self, parts: Sequence[Tensor], size: int, slots: int, buffer: Tensor) -> None:
        # Eight bytes at a time where that fits: a copy on the device moves numbers, not bytes.
        wide = all(own.shape[1] % 8 == 0 for own in parts)
        dtype = torch.int64 if wide else torch.uint8
        self._parts = [own.view(dtype) for own in parts]
        self._blocks = torch.empty(len(parts[0]), dtype=torch.int64, device=buffer.device)
        rows = len(buffer) // size
        self._buffer = buffer[: rows * size].view(rows, size).view(dtype)
        self.memory = HostBlock(
            slots * size, "keys and values (kv_host_gib)", "or lower kv_host_gib"
        )
        self.memory.memory.zero_()
        if buffer.is_cuda:
            self.memory.lock()
        self._slots = self.memory.memory.view(slots, size).view(dtype)

    def spill(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (block, slot) to the host."""
        for part, blocks in self._batches(pairs, [block for block, _ in pairs]):
            rows, begin = self._buffer[: len(part)], 0
            for own in self._parts:
                end = begin + own.shape[1]
                torch.index_select(own, 0, blocks, out=rows[:, begin:end])
                begin = end
            for row, (_, slot) in zip(rows, part, strict=True):
                self._slots[slot].copy_(row, non_blocking=True)

    def restore(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (slot, block) to the device."""
        for part, blocks in self._batches(pairs, [block for _, block in pairs]):
            rows, begin = self._buffer[: len(part)], 0
            for row, (slot, _) in zip(rows, part, strict=True):
                row.copy_(self._slots[slot], non_blocking=True)
            for own in self._parts:
                end = begin + own.shape[1]
                own.index_copy_(0, blocks, rows[:, begin:end])
                begin = end

    def _batches(
        self, pairs: Sequence[tuple[int, int]], blocks: list[int]
    ) -> Iterator[tuple[Sequence[tuple[int, int]], Tensor]]:
        """As many as the buffer holds, with their blocks on the device."""
        if not pairs:
            return
        # At once: a copy from memory that is not locked waits for all copies before it.
        there, size = self._blocks[: len(blocks)], len(self._buffer)
        there.copy_(torch.tensor(blocks))
        for first in range(0, len(pairs), size):
            yield pairs[first : first + size], there[first : first + size]


def _rows(tensor: Tensor) -> Tensor:
    """The bytes of each block, uint8 [blocks, n]."""
    return tensor.flatten(1).view(torch.uint8)
