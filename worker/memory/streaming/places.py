"""Where the large tensors of a layer lie in one block of memory."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.storage import aligned


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of a layer lies in a block, in whatever order its numbers are."""

    tensor: Tensor
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        """The tensor's place in a block, as the tensor is."""
        return self.numbers(memory).as_strided(self.shape, self.stride)

    def numbers(self, memory: Tensor) -> Tensor:
        """The same in the order of the memory, [numbers]."""
        end = self.offset + self.shape.numel() * self.dtype.itemsize
        return memory[self.offset : end].view(self.dtype)

    def empty(self) -> None:
        """Let the tensor's own memory go."""
        self.tensor.data = torch.empty(0, dtype=self.dtype, device=self.tensor.device)

    def settle(self, memory: Tensor) -> None:
        """Let the tensor be its place in a block, for good."""
        self.tensor.data = self.view(memory)


def places_of(tensors: Iterable[Tensor]) -> tuple[list[Place], int]:
    """Places one behind the other, and the bytes of a block for them."""
    places, offset = [], 0
    for tensor in tensors:
        places.append(Place(tensor, offset, tensor.shape, tensor.stride(), tensor.dtype))
        offset += aligned(tensor.nbytes)
    return places, offset
