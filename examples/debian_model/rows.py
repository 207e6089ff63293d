"""Rows: the documents of a split packed into rows of equal length, on the device that trains.

Given up: borders between the documents of a row, across which attention may look.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch

from .encoding import Encoded


class Rows:
    """Packs documents into rows of equal length, in a new order in every epoch.

    A row may begin inside a document and hold several: attention is not cut between them.
    """

    def __init__(self, encoded: Encoded, length: int, seed: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(encoded.tokens.astype(numpy.int32)).to(device)
        self.ends = torch.from_numpy(encoded.ends).to(device)
        self.lengths = torch.from_numpy(encoded.ends - encoded.starts).to(device)
        self.length = length
        self.generator = torch.Generator(device).manual_seed(seed)

    def epoch(self, rows: int) -> Iterator[torch.Tensor]:
        """Batches of `rows` rows, each one token longer than the length, for the targets."""
        order = torch.randperm(
            len(self.lengths), generator=self.generator, device=self.tokens.device
        )
        lengths = self.lengths[order]
        shift = (self.ends - self.lengths)[order] - (lengths.cumsum(0) - lengths)
        index = torch.arange(len(self.tokens), device=self.tokens.device)
        stream = self.tokens[index + shift.repeat_interleave(lengths)]
        packed = stream.unfold(0, self.length + 1, self.length)
        for first in range(0, len(packed) - rows + 1, rows):
            yield packed[first : first + rows].long()

    def batches(self, rows: int) -> Iterator[torch.Tensor]:
        """Epoch after epoch, without end."""
        while True:
            yield from self.epoch(rows)
