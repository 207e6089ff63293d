"""Sequences, and what the teachers have to say of each, worked out once where there is room.

A run reads its text many times over, and what teachers say of it stays the same. Their final hidden
states are kept on the device, a few hundred times less than logits; where they do not fit, they are
made again at every reading. What it gave up: keeping them in the host's memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...memory.device import free_memory
from ...model.decoder import Decoder
from .loss import hidden_states

_SHARE = 2 / 3
"""Of the device's free memory that they may take; training wants the rest."""


class Lessons:
    """`tokens` [n, L], int64, on the host; the teachers are on the device that trains."""

    def __init__(self, tokens: Tensor, teachers: Sequence[Decoder]) -> None:
        self.tokens, self.teachers = tokens, teachers
        self._device = teachers[0].embedding.weight.device
        states = self._made(tokens[:1])
        size = sum(own.nbytes for own in states) * len(tokens)
        self._kept: list[Tensor] | None = None
        if size <= _SHARE * free_memory(self._device):
            self._kept = [own.new_empty(len(tokens), *own.shape) for own in states]
        self._known = torch.zeros(len(tokens), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, chosen: Tensor) -> tuple[Tensor, list[Tensor]]:
        """On the device: the sequences of these indices, and what `hidden_states` has of each
        teacher."""
        tokens = self.tokens[chosen].to(self._device)
        if self._kept is None:
            return tokens, self._made(tokens)
        new = ~self._known[chosen]
        if new.any():
            made = self._made(tokens[new.to(self._device)])
            for kept, own in zip(self._kept, made, strict=True):
                kept[chosen[new].to(self._device)] = own.unflatten(0, (-1, kept.shape[1]))
            self._known[chosen] = True
        places = chosen.to(self._device)
        return tokens, [kept[places].flatten(0, 1) for kept in self._kept]

    def _made(self, tokens: Tensor) -> list[Tensor]:
        with torch.no_grad(), autocast(self._device):
            return [hidden_states(own, tokens.to(self._device)) for own in self.teachers]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
