"""Layers that are kept in a shorter code, on the device and on the host, and run from one slot.

Each module that owns large weights (of attention, MLP, experts) is decoded into the working slot
just before it runs, over the one before it, by the stream that computes: where the link limits a
step there is time for that, and the room of a second slot is better used for layers that need not
cross the link. A block that was copied is needed until its last module is decoded, so its own slot
is free sooner than that of a plain layer. The tensors of all modules are views of the working slot
for good. A code loses nothing: a step gives the same numbers as if layers were plain.

A block has the modules one behind the other; of each the coded tensors first, then those that have
no code, which one copy moves. What it gave up: decoding that hides behind a step of many tokens,
which computes longer than copies take; modules that run twice in a step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....kernels.lossless.codes import Code, code_of, decode, encode
from ...model.decoder import Decoder
from ...model.packed import Field, large_modules
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


class _Module:
    """Where the large tensors of a module lie, in its layer's block and in the working slot."""

    def __init__(self, fields: Iterable[Field], begin: int) -> None:
        coded: list[tuple[Code, Tensor]] = []
        plain: list[Tensor] = []
        for field, format, tensor in fields:
            code = code_of(field, format, tuple(tensor.shape), tensor.dtype)
            if code is None:
                plain.append(tensor)
            else:
                coded.append((code, tensor))
        places, self._decoded = places_of(tensor for _, tensor in coded)
        self._rest, self._rest_bytes = places_of(plain)
        self._parts, self._rest_begin = [], begin
        for (code, _), place in zip(coded, places, strict=True):
            self._parts.append(_Part(code, self._rest_begin, place))
            self._rest_begin += aligned(code.bytes)

    @property
    def end(self) -> int:
        """Where the next module begins in the block."""
        return self._rest_begin + self._rest_bytes

    @property
    def bytes(self) -> int:
        """In the working slot."""
        return self._decoded + self._rest_bytes

    def fill(self, block: Tensor) -> None:
        """Bring the tensors into a block, and let their own memory go."""
        for part in self._parts:
            flat = part.place.tensor.detach().as_strided((part.place.shape.numel(),), (1,))
            part.codes(block).copy_(encode(part.code, flat.view(part.place.shape)))
            part.place.empty()
        for place in self._rest:
            place.view(block[self._rest_begin :]).copy_(place.tensor.detach())
            place.empty()

    def decode(self, block: Tensor, working: Tensor) -> None:
        """Bring them from a block into the working slot."""
        for part in self._parts:
            out = part.place.numbers(working).view(part.place.shape)
            decode(part.code, part.codes(block), out)
        # Last: a kernel that reads weights before the one in front of it has ended (`gdc_wait`)
        # has scales, which have no code; and nothing begins before a copy has ended.
        if self._rest_bytes:
            rest = block[self._rest_begin : self.end]
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
        self._modules: list[list[_Module]] = []
        """Of each layer."""
        self._stay: dict[int, Tensor] = {}
        """Blocks of layers that stay."""
        self._working = torch.empty(0, dtype=torch.uint8, device=device)
        self._block: Tensor | None = None
        """That of the layer that runs, until all its modules are decoded."""
        self._left = 0
        """Modules of that layer that are still to be decoded."""

    def take(self, decoder: Decoder, layer: int) -> None:
        """Encode a layer's large weights, on the host if it is streamed; layers come in order.

        Raises ConfigError if the host has no memory for them or does not lock it, and CodeError if
        there are weights that the code has no room for.
        """
        assert layer == len(self._modules), "layers come in order"
        modules, size = _modules_of(decoder.layers[layer])
        assert (
            size == self.residency.blocks[layer]
            and max(each.bytes for each in modules) <= self.residency.working
        ), "the layer is not as it was planned"
        if layer in self._positions:
            host = HostBlock(size)
            _fill(modules, host.memory)
            self.copies.add(host)
        else:
            self._stay[layer] = torch.empty(size, dtype=torch.uint8, device=self._device)
            _fill(modules, self._stay[layer])
        self._modules.append(modules)

    def start(self, decoder: Decoder) -> None:
        """Allocate the slots, and let the decoder's layers run from the working one."""
        self.copies.start()
        size = self.residency.working
        self._working = torch.empty(size, dtype=torch.uint8, device=self._device)
        for number, (layer, modules) in enumerate(zip(decoder.layers, self._modules, strict=True)):
            self._hook_layer(layer, number)
            for (module, _), own in zip(large_modules(layer), modules, strict=True):
                own.settle(self._working)
                self._hook_module(module, own, number)
        self._hook_steps(decoder)

    def _hook_layer(self, layer: nn.Module, number: int) -> None:
        layer.register_forward_pre_hook(lambda *_: self._begin(number))
        # Also where the layer fails, or its slot would never be free.
        layer.register_forward_hook(lambda *_: self._end(number), always_call=True)

    def _hook_module(self, module: nn.Module, own: _Module, layer: int) -> None:
        module.register_forward_pre_hook(lambda *_: self._decode(own, layer))
        if self.copies.poison:
            module.register_forward_hook(lambda *_: self._spoil(), always_call=True)

    def _begin(self, layer: int) -> None:
        """Called before a layer."""
        position = self._positions.get(layer)
        self._block = self._stay[layer] if position is None else self.copies.acquire(position)
        self._left = len(self._modules[layer])

    def _decode(self, own: _Module, layer: int) -> None:
        """Called before a module of a layer."""
        assert self._block is not None, "a module ran twice, or without its layer"
        with self.copies.watched("decoding", layer):
            own.decode(self._block, self._working)
        self._left -= 1
        if not self._left:
            self._end(layer)

    def _end(self, layer: int) -> None:
        """Called when all modules of a layer are decoded, and after it."""
        position = self._positions.get(layer)
        if self._block is not None and position is not None:
            self.copies.release(position)
        self._block = None

    def _spoil(self) -> None:
        self._working.fill_(POISON)


def _modules_of(layer: nn.Module) -> tuple[list[_Module], int]:
    """Those of a layer, and the bytes of its block."""
    modules, end = [], 0
    for _, fields in large_modules(layer):
        modules.append(_Module(fields, end))
        end = modules[-1].end
    return modules, end


def _fill(modules: Iterable[_Module], block: Tensor) -> None:
    for module in modules:
        module.fill(block)


def stream_of(
    residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
) -> LayerStream:
    """What lets a decoder run as `residency` says; see `LayerStream`."""
    kind = CodedStream if residency.working else LayerStream
    return kind(residency, device, prefetch, poison)
