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
    max_error: float | None = None
    """Of its keys and values, where they are stored in narrow numbers; None for the engine's."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring rows of a step that one attention call serves."""

    rows: slice
    sequences: int
    queries: int
    """Tokens of each sequence."""
    tables: tuple[Tensor, ...]
    """int64 [sequences, blocks] for each cache group: the blocks that the window reaches."""
    offsets: tuple[Tensor, ...]
    """int64 [sequences] for each cache group: where a sequence's first token lies in its row of
    the table."""
    begins: tuple[tuple[int, ...], ...]
    """`offsets` as the host knows them; of no use to decoding."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one run of the model reads."""

    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    slots: tuple[Tensor, ...]
    """int64 [T] for each cache group: where each token's keys and values are stored; nowhere if it
    is negative."""
    parts: tuple[Part, ...]
    logit_rows: Tensor | None
    """int64: rows whose logits are wanted, in the order of the chunks; None for all rows."""
    decodes: bool
    """Whether every sequence runs one token."""
    owners: Integers | None
    """[T]: which chunk a row is of; None in a recording."""


def build_step(
    chunks: Sequence[Chunk],
    windows: Sequence[int | None],
    block_size: int,
    device: torch.device,
) -> Step:
    """The step that runs `chunks`; `windows` has one entry for each cache group.

    Chunks of one token come first among the rows, in any order given.
    """
    assert chunks and all(chunk.tokens and chunk.logits <= len(chunk.tokens) for chunk in chunks)
    decoding = [chunk for chunk in chunks if len(chunk.tokens) == 1]
    prefilling = [chunk for chunk in chunks if len(chunk.tokens) > 1]
    parts = []
    begin = 0
    for members in ([decoding] if decoding else []) + [[chunk] for chunk in prefilling]:
        parts.append(_part(members, begin, windows, block_size, device))
        begin = parts[-1].rows.stop
    ordered = decoding + prefilling
    numbers = sorted(range(len(chunks)), key=lambda number: len(chunks[number].tokens) > 1)
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
        decodes=not prefilling,
        owners=np.repeat(numbers, [len(chunk.tokens) for chunk in ordered]),
    )


def decode_step(
    tokens: Tensor,
    positions: Tensor,
    slots: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    offsets: tuple[Tensor, ...],
) -> Step:
    """The step of sequences that all run one token, put together from its tensors."""
    begins: tuple[tuple[int, ...], ...] = ((),) * len(tables)
    part = Part(slice(0, len(tokens)), len(tokens), 1, tables, offsets, begins)
    return Step(tokens, positions, slots, (part,), None, True, None)


def _part(
    chunks: Sequence[Chunk],
    begin: int,
    windows: Sequence[int | None],
    block_size: int,
    device: torch.device,
) -> Part:
    """Chunks of equal length as the rows from `begin` on."""
    queries = len(chunks[0].tokens)
    reached = [_reach(chunks, group, window, block_size) for group, window in enumerate(windows)]
    return Part(
        slice(begin, begin + queries * len(chunks)),
        len(chunks),
        queries,
        tuple(torch.from_numpy(tables).to(device) for tables, _ in reached),
        tuple(torch.from_numpy(offsets).to(device) for _, offsets in reached),
        tuple(tuple(offsets.tolist()) for _, offsets in reached),
    )


def _reach(
    chunks: Sequence[Chunk], group: int, window: int | None, block_size: int
) -> tuple[Integers, Integers]:
    """Tables and offsets of chunks of equal length: only the blocks that their windows reach."""
    offsets, used = [], []
    for chunk in chunks:
        first, blocks = reached(chunk, group, window, block_size)
        offsets.append(chunk.start - first * block_size)
        used.append(blocks)
    tables = np.empty((len(chunks), max(map(len, used))), np.int64)
    for row, blocks in zip(tables, used, strict=True):
        row[: len(blocks)] = blocks
        row[len(blocks) :] = blocks[0]  # masked, but read: must be a block of finite numbers
    return tables, np.array(offsets, np.int64)


def reached(
    chunk: Chunk, group: int, window: int | None, block_size: int
) -> tuple[int, Sequence[int]]:
    """The blocks of a group that a chunk's windows reach, and which of its table is the first."""
    seen_from = 0 if window is None else max(0, chunk.start - window + 1)
    first = seen_from // block_size
    blocks = chunk.tables[group][first : (chunk.end - 1) // block_size + 1]
    assert blocks[0] >= 0, "a block inside the window is missing"
    return first, blocks


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
