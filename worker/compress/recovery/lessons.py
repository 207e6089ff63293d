"""Sequences, and what the teachers have to say of each, worked out once where there is room.

A run reads its text many times over, and what teachers say of it stays the same. Their final hidden
states are kept on the device, a few hundred times less than logits; those that do not fit are made
again at every reading. What it gave up: keeping them in the host's memory.
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
    """`tokens` [n, L], int64, on the host; the teachers are on the device that trains.

    The last `written` rows are the teachers' own text.
    """

    def __init__(self, tokens: Tensor, teachers: Sequence[Decoder], written: int = 0) -> None:
        self.tokens, self.teachers = tokens, teachers
        self._real = len(tokens) - written
        self._device = teachers[0].embedding.weight.device
        states = self._made(tokens[:1])
        size = sum(own.nbytes for own in states)
        self._room = min(len(tokens), int(_SHARE * free_memory(self._device)) // size)
        self._kept = [own.new_empty(self._room, *own.shape) for own in states]
        self._known = torch.zeros(len(tokens), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, chosen: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """On the device: the sequences of these indices, what `hidden_states` has of each teacher,
        and which are real text."""
        tokens = self.tokens[chosen].to(self._device)
        real = (chosen < self._real).to(self._device)
        kept = chosen < self._room
        new = ~(kept & self._known[chosen])
        if new.all() and not kept.any():
            return tokens, self._made(tokens), real
        theirs = [own[chosen.clamp(max=self._room - 1).to(self._device)] for own in self._kept]
        if new.any():
            made = self._made(tokens[new.to(self._device)])
            places, fits = chosen[new & kept].to(self._device), kept[new].to(self._device)
            for whole, own, states in zip(theirs, self._kept, made, strict=True):
                rows = states.unflatten(0, (-1, own.shape[1]))
                whole[new.to(self._device)] = rows
                own[places] = rows[fits]
            self._known[chosen[kept]] = True
        return tokens, [whole.flatten(0, 1) for whole in theirs], real

    def _made(self, tokens: Tensor) -> list[Tensor]:
        with torch.no_grad(), autocast(self._device):
            return [hidden_states(own, tokens.to(self._device)) for own in self.teachers]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
