"""One step's work as tensors: from chunks of sequences to flat tokens, slots and pages.

Chunks of one token (decoding) run as one padded batch; longer ones (prefill) run by sequence, for
their tables differ too much in length to pad. Bookkeeping goes through numpy once a chunk; no loop
touches a token. What it gave up: tables are built afresh every step, which a CUDA graph would want
kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.reference import Pages, plan_pages

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's share of a step."""

    tokens: Sequence[int]
    """Token ids to run now."""
    start: int
    """Position of tokens[0]; positions before it are in the cache."""
    tables: tuple[Sequence[int], ...]
    """A block table for each cache group: entry i is the block of positions [i * block_size,
    (i + 1) * block_size), or -1 where that has slid out of the window."""
    logits: int
    """How many of the last positions need logits: 1 to sample, 0 in mid-prompt."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring rows of a step that one attention call serves."""

    rows: slice
    sequences: int
    pages: tuple[Pages, ...]
    """One for each cache group."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one run of the model reads."""

    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    slots: tuple[Tensor, ...]
    """int64 [T] for each cache group: where each token's keys and values are stored."""
    parts: tuple[Part, ...]
    logit_rows: Tensor | None
    """int64: rows whose logits are wanted, in the order of the chunks; None for all rows."""


def build_step(
    chunks: Sequence[Chunk],
    windows: Sequence[int | None],
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Step:
    """The step that runs `chunks`; `windows` has one entry for each cache group.

    `dtype` is the activations'. Chunks of one token come first among the rows, in any order given.
    """
    assert chunks and all(chunk.tokens and chunk.logits <= len(chunk.tokens) for chunk in chunks)
    decoding = [chunk for chunk in chunks if len(chunk.tokens) == 1]
    prefilling = [chunk for chunk in chunks if len(chunk.tokens) > 1]
    parts = []
    begin = 0
    for members in ([decoding] if decoding else []) + [[chunk] for chunk in prefilling]:
        rows = slice(begin, begin + sum(len(chunk.tokens) for chunk in members))
        pages = tuple(
            _pages(members, group, window, block_size, device, dtype)
            for group, window in enumerate(windows)
        )
        parts.append(Part(rows, len(members), pages))
        begin = rows.stop
    ordered = decoding + prefilling
    positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in ordered])
    tokens = np.concatenate([np.asarray(chunk.tokens, np.int64) for chunk in ordered])
    return Step(
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        slots=tuple(
            torch.from_numpy(_slots(ordered, group, block_size)).to(device)
            for group in range(len(windows))
        ),
        parts=tuple(parts),
        logit_rows=_logit_rows(chunks, ordered, device),
    )


def _pages(
    chunks: Sequence[Chunk],
    group: int,
    window: int | None,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Pages:
    """The pages of chunks of equal length: only the blocks that their windows reach."""
    offsets, used = [], []
    for chunk in chunks:
        seen_from = 0 if window is None else max(0, chunk.start - window + 1)
        first = seen_from // block_size
        blocks = chunk.tables[group][first : (chunk.end - 1) // block_size + 1]
        assert blocks[0] >= 0, "a block inside the window is missing"
        offsets.append(chunk.start - first * block_size)
        used.append(blocks)
    tables = np.empty((len(chunks), max(map(len, used))), np.int64)
    for row, blocks in zip(tables, used, strict=True):
        row[: len(blocks)] = blocks
        row[len(blocks) :] = blocks[0]  # masked, but read: must be a block of finite numbers
    return plan_pages(
        torch.from_numpy(tables).to(device),
        torch.tensor(offsets, device=device),
        window,
        queries=len(chunks[0].tokens),
        block_size=block_size,
        dtype=dtype,
    )


def _slots(chunks: Sequence[Chunk], group: int, block_size: int) -> Integers:
    """Where each token's keys and values go, int64 [T]."""
    return np.concatenate([_chunk_slots(chunk, group, block_size) for chunk in chunks])


def _chunk_slots(chunk: Chunk, group: int, block_size: int) -> Integers:
    first = chunk.start // block_size
    blocks = chunk.tables[group][first : (chunk.end - 1) // block_size + 1]
    assert blocks[0] >= 0, "a block to write to is missing"
    if len(chunk.tokens) == 1:
        return np.array([blocks[0] * block_size + chunk.start % block_size])
    positions = np.arange(chunk.start, chunk.end)
    return np.asarray(blocks)[positions // block_size - first] * block_size + positions % block_size


def _logit_rows(
    chunks: Sequence[Chunk], ordered: Sequence[Chunk], device: torch.device
) -> Tensor | None:
    """The rows of `ordered` whose logits are wanted, in the order of `chunks`."""
    if all(len(chunk.tokens) == 1 == chunk.logits for chunk in chunks):
        return None
    ends = np.cumsum([len(chunk.tokens) for chunk in ordered])
    end_of = {id(chunk): end for chunk, end in zip(ordered, ends, strict=True)}
    rows = [np.arange(end_of[id(chunk)] - chunk.logits, end_of[id(chunk)]) for chunk in chunks]
    return torch.from_numpy(np.concatenate(rows)).to(device)
