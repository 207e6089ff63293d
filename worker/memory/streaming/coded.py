"""Layers that are kept in a shorter code, on the device and on the host, and run from one slot.

Each layer is decoded into the working slot just before it runs, by the stream that computes: where
the link limits a step there is time for that, and the room of a second slot is better used for
layers that need not cross the link. A block that was copied is needed until it is decoded, so its
own slot is free sooner than that of a plain layer. The tensors of all layers are views of the
working slot for good. A code loses nothing: a step gives the same numbers as if layers were plain.

A block has the coded tensors first, then those that have no code, which one copy moves. What it
gave up: decoding that hides behind a step of many tokens, which computes longer than copies take.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....kernels.lossless.codes import Code, code_of, decode, encode
from ...model.decoder import Decoder
from ...model.packed import large_fields
from ...model.storage import aligned
from ..host import HostBlock
from ..residency import Residency
from .copies import POISON
from .layers import LayerStream
from .places import Place, places_of


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor that is coded."""

    code: Code
    offset: int
    """Of its code in the layer's block."""
    place: Place
    """In the working slot."""

    def codes(self, block: Tensor) -> Tensor:
        return block[self.offset : self.offset + self.code.bytes]


class _Layout:
    """Where the tensors of a layer lie, in its block and in the working slot."""

    def __init__(self, layer: nn.Module) -> None:
        coded: list[tuple[Code, Tensor]] = []
        plain: list[Tensor] = []
        for field, format, tensor in large_fields(layer):
            code = code_of(field, format, tuple(tensor.shape), tensor.dtype)
            if code is None:
                plain.append(tensor)
            else:
                coded.append((code, tensor))
        places, self._decoded = places_of(tensor for _, tensor in coded)
        self._rest, self._rest_bytes = places_of(plain)
        self._parts, self._coded = [], 0
        for (code, _), place in zip(coded, places, strict=True):
            self._parts.append(_Part(code, self._coded, place))
            self._coded += aligned(code.bytes)

    @property
    def block_bytes(self) -> int:
        """Of the block."""
        return self._coded + self._rest_bytes

    def fill(self, block: Tensor) -> None:
        """Bring the tensors into a block, and let their own memory go."""
        for part in self._parts:
            flat = part.place.tensor.detach().as_strided((part.place.shape.numel(),), (1,))
            part.codes(block).copy_(encode(part.code, flat.view(part.place.shape)))
            part.place.empty()
        for place in self._rest:
            place.view(block[self._coded :]).copy_(place.tensor.detach())
            place.empty()

    def decode(self, block: Tensor, working: Tensor) -> None:
        """Bring them from a block into the working slot."""
        for part in self._parts:
            out = part.place.numbers(working).view(part.place.shape)
            decode(part.code, part.codes(block), out)
        if self._rest_bytes:
            rest = block[self._coded : self.block_bytes]
            working[self._decoded :][: self._rest_bytes].copy_(rest)

    def settle(self, working: Tensor) -> None:
        """Let the tensors be their places in the working slot, for good."""
        for part in self._parts:
            part.place.settle(working)
        for place in self._rest:
            place.settle(working[self._decoded :])


class CodedStream(LayerStream):
    """The layers of one decoder, kept coded; see `LayerStream`."""

    def __init__(
        self, residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
    ) -> None:
        super().__init__(residency, device, prefetch, poison)
        self._device = device
        self._layouts: list[_Layout] = []
        self._stay: dict[int, Tensor] = {}
        """Blocks of layers that stay."""
        self._working = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, decoder: Decoder, layer: int) -> None:
        """Encode a layer's large weights, on the host if it is streamed; layers come in order.

        Raises ConfigError if the host has no memory for them or does not lock it, and CodeError if
        there are weights that the code has no room for.
        """
        assert layer == len(self._layouts), "layers come in order"
        layout = _Layout(decoder.layers[layer])
        size = layout.block_bytes
        assert size == self.residency.blocks[layer], "the layer is not as it was planned"
        if layer in self._positions:
            block = HostBlock(size)
            layout.fill(block.memory)
            self.copies.add(block)
        else:
            self._stay[layer] = torch.empty(size, dtype=torch.uint8, device=self._device)
            layout.fill(self._stay[layer])
        self._layouts.append(layout)

    def start(self, decoder: Decoder) -> None:
        """Allocate the slots, and let the decoder's layers run from the working one."""
        self.copies.start()
        size = self.residency.working
        self._working = torch.empty(size, dtype=torch.uint8, device=self._device)
        for number, layout in enumerate(self._layouts):
            layout.settle(self._working)
            self._hook_coded(decoder.layers[number], number)
        self._hook_steps(decoder)

    def _hook_coded(self, layer: nn.Module, number: int) -> None:
        layer.register_forward_pre_hook(lambda *_: self._decode(number))
        if self.copies.poison:
            layer.register_forward_hook(lambda *_: self._spoil(), always_call=True)

    def _decode(self, layer: int) -> None:
        position = self._positions.get(layer)
        block = self._stay[layer] if position is None else self.copies.acquire(position)
        with self.copies.watched("decoding", layer):
            self._layouts[layer].decode(block, self._working)
        if position is not None:
            self.copies.release(position)

    def _spoil(self) -> None:
        self._working.fill_(POISON)


def stream_of(
    residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
) -> LayerStream:
    """What lets a decoder run as `residency` says; see `LayerStream`."""
    kind = CodedStream if residency.working else LayerStream
    return kind(residency, device, prefetch, poison)
