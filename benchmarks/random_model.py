"""Decoders of real shapes and random weights, made on the device a layer at a time.

Speed and memory do not depend on values. One layer of each kind is drawn and packed; all others are
the same with their rows in another place, so that no two are alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from conclave.kernels.formats import Format, PackedWeight, from_tensors
from conclave.kernels.integer.weights import pack_whole
from conclave.kernels.layouts import pack
from conclave.worker.memory.experts.cache import ExpertCache
from conclave.worker.memory.streaming.layers import LayerStream
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.packed import packable, put_packed, tables
from conclave.worker.weights import allocate, blank_decoder

DTYPE = torch.bfloat16
TABLES = Format.parse("dense-int8-g64")
"""Of embeddings, as `conclave compress` makes them unless told otherwise; plain ones where layers
are."""
_Weight = Tensor | PackedWeight


class RandomModel:
    """Makes equal decoders of one shape and format; None leaves weights in bfloat16."""

    def __init__(
        self,
        config: ModelConfig,
        format: Format | None,
        device: torch.device,
        tables: Format = TABLES,
        whole: bool = False,
    ) -> None:
        """If `whole`, scales are whole numbers of their row's unit."""
        self.config = config
        self.pack = pack_whole if whole else pack
        self.format = format
        self.tables = tables
        self.device = device
        self._drawn: dict[object, _Weight] = {}
        self._draw = torch.Generator(device).manual_seed(0)

    def formats(self) -> dict[str, Format]:
        """Of all packed weights, by name."""
        if self.format is None:
            return {}
        blank = blank_decoder(self.config)
        large = {name: self.format for names in packable(blank).values() for name in names}
        return large | {name: self.tables for names in tables(blank).values() for name in names}

    def decoder(self, stream: LayerStream | ExpertCache | None = None) -> Decoder:
        """A new one, some of its layers, or their experts, taken by `stream`."""
        draw = torch.Generator(self.device).manual_seed(1)  # of its own: all decoders are equal
        decoder = blank_decoder(self.config)
        for index, layer in enumerate(decoder.layers):
            for module, names in packable(decoder, index).items():
                self._put(decoder, module, [self._weight(decoder, index, n) for n in names])
            self._fill_rest(layer, draw)
            if stream is not None:
                stream.take(decoder, index)
        if self.format is not None:
            for module, (name,) in tables(decoder).items():
                self._put(decoder, module, [self._table(decoder, name)])
        self._fill_rest(decoder, draw)
        if stream is not None:
            stream.start(decoder)
        return decoder.eval().requires_grad_(False)

    def forget(self) -> None:
        """Give back the memory of what was drawn; the next decoder draws the same again."""
        self._drawn.clear()
        self._draw.manual_seed(0)

    def _put(self, decoder: Decoder, module: str, weights: list[_Weight]) -> None:
        packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
        if packed:
            put_packed(decoder, module, packed, DTYPE)
            return
        plain = [weight for weight in weights if isinstance(weight, Tensor)]
        names = packable(decoder)[module]
        for name, weight in zip(names, plain, strict=True):
            owner, _, own = name.rpartition(".")
            setattr(decoder.get_submodule(owner), own, nn.Parameter(weight, requires_grad=False))

    def _weight(self, decoder: Decoder, index: int, name: str) -> _Weight:
        """The large weight `name` of a layer."""
        shape = decoder.get_parameter(name).shape

        def make() -> _Weight:
            drawn = self._normal(shape)
            return drawn if self.format is None else self.pack(drawn, self.format)

        kind = name.removeprefix(f"layers.{index}."), shape
        return _turned(self._once(kind, make), index)

    def _table(self, decoder: Decoder, name: str) -> _Weight:
        shape = decoder.get_parameter(name).shape
        return self._once(name, lambda: pack(self._normal(shape), self.tables))

    def _once(self, key: object, make: Callable[[], _Weight]) -> _Weight:
        if key not in self._drawn:
            self._drawn[key] = make()
        return self._drawn[key]

    def _normal(self, shape: torch.Size) -> Tensor:
        weight = torch.empty(shape, dtype=DTYPE, device=self.device)
        return weight.normal_(std=shape[-1] ** -0.5, generator=self._draw)

    def _fill_rest(self, module: nn.Module, draw: torch.Generator) -> None:
        """Norms, routers, scalars; and embeddings that are not packed."""
        blank = [name for name, own in module.named_parameters() if own.is_meta]
        blank += [name for name, own in module.named_buffers() if own.is_meta]
        allocate(module, self.device, DTYPE)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name in blank:
            own = tensors[name].data
            if own.dim() == 1:
                own.uniform_(0.5, 1.5, generator=draw)
            else:
                own.normal_(std=own.shape[-1] ** -0.5, generator=draw)


def _turned(weight: _Weight, places: int) -> _Weight:
    """The same with rows, tiles of rows or experts that many places further."""
    if isinstance(weight, Tensor):
        return weight.roll(places, 0)
    moved = {name: own.roll(places, 0) for name, own in weight.tensors().items()}
    return from_tensors(weight.format, weight.rows, weight.columns, moved)
