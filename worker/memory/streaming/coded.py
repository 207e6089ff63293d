"""Layers that are kept in a shorter code, on the device and on the host, and run from one slot.

Each module that owns large weights (of attention, MLP, experts) is decoded into the working slot
just before it runs, over the one before it, by the stream that computes: where the link limits a
step there is time for that, and the room of a second slot is better used for layers that need not
cross the link. The tensors of all modules are views of the working slot for good. A code loses
nothing: a step gives the same numbers as if layers were plain.

A block has a part for each module, in the order in which they run, and a part that was copied is
needed only until its module is decoded: then the same part of the next layer begins to come to its
place (see `copies`). So one slot is enough to keep the link busy. In a part lie first the tensors
that have no code, which one copy on the device moves, then the coded ones, one whose code may end
without use (`codes.used`) last: that end is neither kept on the host nor copied.

What it gave up: decoding that hides behind a step of many tokens, which computes longer than copies
take; modules that run twice in a step; copying no unused end of codes that are not the last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....kernels.lossless.codes import Code, code_of, decode, encode, used
from ....kernels.lossless.exponents import ExponentCode
from ...model.decoder import Decoder
from ...model.packed import Field, large_modules
from ...model.storage import aligned
from ..host import HostBlock
from ..residency import Residency
from .copies import POISON
from .layers import LayerStream
from .places import Place, places_of


@dataclass(frozen=True, slots=True)
class _Coded:
    """One tensor that is coded."""

    code: Code
    offset: int
    """Of its code in its module's part."""
    place: Place
    """In the working slot."""

    def codes(self, part: Tensor) -> Tensor:
        return part[self.offset : self.offset + self.code.bytes]


def _offsets(codes: Sequence[Code], begin: int) -> tuple[list[int], int]:
    """Where codes lie from `begin` on, and their end; behind others one that may end without use.

    Offsets are in the order of `codes`: in that they are decoded.
    """
    offsets, end = [0] * len(codes), begin
    for index in sorted(range(len(codes)), key=lambda each: isinstance(codes[each], ExponentCode)):
        offsets[index] = end
        end += aligned(codes[index].bytes)
    return offsets, end


class _Module:
    """Where the large tensors of a module lie, in its part of a block and in the working slot."""

    def __init__(self, fields: Iterable[Field]) -> None:
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
        codes = [code for code, _ in coded]
        offsets, self.size = _offsets(codes, self._rest_bytes)
        """The size of its part."""
        self._coded = [*map(_Coded, codes, offsets, places)]
        self.bytes = self._decoded + self._rest_bytes
        """In the working slot."""
        self._steps: list[tuple[Code, Tensor, Tensor]] = []
        """What is decoded, from where and to where."""
        self._copy: tuple[Tensor, Tensor] | None = None
        """Of what has no code: to where, and from where."""

    def fill(self, part: Tensor) -> int:
        """Bring the tensors into a part, and let their own memory go.

        Returns how many of its bytes, the first ones, are used.
        """
        for place in self._rest:
            place.view(part).copy_(place.tensor.detach())
            place.empty()
        for own in self._coded:
            flat = own.place.tensor.detach().as_strided((own.place.shape.numel(),), (1,))
            own.codes(part).copy_(encode(own.code, flat.view(own.place.shape)))
            own.place.empty()
        if not self._coded:
            return self.size
        last = max(self._coded, key=lambda own: own.offset)
        return aligned(last.offset + used(last.code, last.codes(part)))

    def settle(self, part: Tensor, working: Tensor) -> None:
        """Let the tensors be their places in the working slot, for good, decoded from `part`."""
        for own in self._coded:
            own.place.settle(working)
            out = own.place.numbers(working).view(own.place.shape)
            self._steps.append((own.code, own.codes(part), out))
        rest = working[self._decoded :]
        for place in self._rest:
            place.settle(rest)
        if self._rest_bytes:
            self._copy = rest[: self._rest_bytes], part[: self._rest_bytes]

    def decode(self) -> None:
        """Bring them from their part, which is there, into the working slot."""
        for code, coded, out in self._steps:
            decode(code, coded, out)
        # Last: a kernel that reads weights before the one in front of it has ended (`gdc_wait`)
        # has scales, which have no code; and nothing begins before a copy has ended.
        if self._copy is not None:
            out, plain = self._copy
            out.copy_(plain)


class CodedStream(LayerStream):
    """The layers of one decoder, kept coded; see `LayerStream`."""

    def __init__(
        self, residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
    ) -> None:
        super().__init__(residency, device, prefetch, poison)
        self._device = device
        self._modules: list[list[_Module]] = []
        """Of each layer."""
        self._stay: dict[int, tuple[Tensor, ...]] = {}
        """Parts of layers that stay."""
        self._working = torch.empty(0, dtype=torch.uint8, device=device)
        self._left: list[int] = []
        """Parts of the layer that runs that were not given back yet."""

    def take(self, decoder: Decoder, layer: int) -> None:
        """Encode a layer's large weights, on the host if it is streamed; layers come in order.

        Raises ConfigError if the host has no memory for them or does not lock it, and CodeError if
        there are weights that the code has no room for.
        """
        assert layer == len(self._modules), "layers come in order"
        modules = [_Module(fields) for _, fields in large_modules(decoder.layers[layer])]
        sizes = self.residency.parts[layer]
        assert [each.size for each in modules] == [size for size in sizes if size] and max(
            each.bytes for each in modules
        ) <= self.residency.working, "the layer is not as it was planned"
        if layer in self._positions:
            host = HostBlock(sum(sizes))
            self.copies.add(host, _fill_closely(modules, host))
        else:
            block = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            self._stay[layer] = block.split(list(sizes))
            for module, part in zip(modules, self._stay[layer], strict=False):
                module.fill(part)
        self._modules.append(modules)

    def start(self, decoder: Decoder) -> None:
        """Allocate the slots, and let the decoder's layers run from the working one."""
        self.copies.start()
        size = self.residency.working
        self._working = torch.empty(size, dtype=torch.uint8, device=self._device)
        for number, (layer, modules) in enumerate(zip(decoder.layers, self._modules, strict=True)):
            self._hook_layer(layer, number)
            pairs = zip(large_modules(layer), modules, strict=True)
            for part, ((module, _), own) in enumerate(pairs):
                own.settle(self._part(number, part), self._working)
                self._hook_module(module, own, number, part)
        self._hook_steps(decoder)

    def _part(self, layer: int, part: int) -> Tensor:
        """Where a part of a layer always lies, or comes."""
        if layer in self._positions:
            return self.copies.memory(self._positions[layer], part)
        return self._stay[layer][part]

    def _hook_layer(self, layer: nn.Module, number: int) -> None:
        layer.register_forward_pre_hook(lambda *_: self._begin(number))
        # Also where the layer fails, or not all its modules run: its slot must be free.
        layer.register_forward_hook(lambda *_: self._end(number), always_call=True)

    def _hook_module(self, module: nn.Module, own: _Module, layer: int, part: int) -> None:
        module.register_forward_pre_hook(lambda *_: self._decode(own, layer, part))
        if self.copies.poison:
            module.register_forward_hook(lambda *_: self._spoil(), always_call=True)

    def _begin(self, layer: int) -> None:
        """Called before a layer."""
        self._left = [*range(len(self.residency.parts[layer]))]

    def _decode(self, own: _Module, layer: int, part: int) -> None:
        """Called before a module of a layer."""
        assert part in self._left, "a module ran twice, or without its layer"
        if layer in self._positions:
            self.copies.acquire(self._positions[layer], part)
        with self.copies.watched("decoding", layer):
            own.decode()
        self._give_back(layer, part)

    def _end(self, layer: int) -> None:
        """Called after a layer: the parts of modules that it does not have, or that did not run."""
        for part in [*self._left]:
            self._give_back(layer, part)

    def _give_back(self, layer: int, part: int) -> None:
        self._left.remove(part)
        if layer in self._positions:
            self.copies.release(self._positions[layer], part)

    def _spoil(self) -> None:
        self._working.fill_(POISON)


def _fill_closely(modules: Iterable[_Module], host: HostBlock) -> list[int]:
    """What is used of each module's part, one behind the other and nothing else; their bytes."""
    sizes: list[int] = []
    for module in modules:
        # The unused end of the part before is written over.
        sizes.append(module.fill(host.memory[sum(sizes) :][: module.size]))
    host.trim(sum(sizes))
    return sizes


def stream_of(
    residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
) -> LayerStream:
    """What lets a decoder run as `residency` says; see `LayerStream`."""
    kind = CodedStream if residency.working else LayerStream
    return kind(residency, device, prefetch, poison)
