"""Where the large tensors of a layer lie in one block of memory."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...model.packed import large_tensors
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
        end = self.offset + self.shape.numel() * self.dtype.itemsize
        return memory[self.offset : end].view(self.dtype).as_strided(self.shape, self.stride)

    def empty(self) -> None:
        """Let the tensor's own memory go."""
        self.tensor.data = torch.empty(0, dtype=self.dtype, device=self.tensor.device)

    def settle(self, memory: Tensor) -> None:
        """Let the tensor be its place in a block, for good."""
        self.tensor.data = self.view(memory)


def places_of(layer: nn.Module) -> tuple[list[Place], int]:
    """All that a layer streams, and the bytes of a block for it."""
    places, offset = [], 0
    for tensor in large_tensors(layer):
        places.append(Place(tensor, offset, tensor.shape, tensor.stride(), tensor.dtype))
        offset += aligned(tensor.nbytes)
    return places, offset
