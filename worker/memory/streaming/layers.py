"""Layers that do not stay on the device and run from the slots that they are copied into.

The tensors of a streamed layer are views of its slot for good: kernels and CUDA graphs see fixed
addresses, and a step gives the same numbers as if all stayed. Hooks on the layers start the copies
(see `copies`), so a decoder knows nothing of it. What it gave up: layers whose parts stay.
"""

import torch
from torch import nn

from ...model.decoder import Decoder
from ...model.packed import large_tensors
from ..host import HostBlock
from ..residency import Residency
from .copies import Copies, StreamUse
from .places import Place, places_of


class LayerStream:
    """The layers of one decoder that are streamed.

    Each goes through `take` once it is loaded on the device; then `start`.

    Args:
        residency: which they are.
        device: where they run.
        prefetch: whether copies begin when a slot is free; else each when its layer begins.
        poison: fill a slot that is given back with NaN, to show who reads it later: for tests.
    """

    def __init__(
        self, residency: Residency, device: torch.device, prefetch: bool, poison: bool = False
    ) -> None:
        self.residency = residency
        self.copies = Copies(residency, device, prefetch, poison)
        self._positions = {layer: number for number, layer in enumerate(residency.streamed)}
        self._places: list[list[Place]] = []

    def take(self, decoder: Decoder, layer: int) -> None:
        """Move a layer's large weights to the host, if it is streamed; layers come in order.

        Raises ConfigError if the host has no memory for them or does not lock it.
        """
        if layer not in self._positions:
            return
        assert self._positions[layer] == len(self._places), "layers come in order"
        places, size = places_of(large_tensors(decoder.layers[layer]))
        block = HostBlock(size)
        for place in places:
            place.view(block.memory).copy_(place.tensor.detach())
            place.empty()
        self._places.append(places)
        self.copies.add(block, [size])

    def start(self, decoder: Decoder) -> None:
        """Allocate the slots, and let the decoder's layers run from them."""
        self.copies.start()
        for layer, position in self._positions.items():
            for place in self._places[position]:
                place.settle(self.copies.memory(position, 0))
            self._hook(decoder.layers[layer], position)
        self._hook_steps(decoder)

    def before_recording(self) -> None:
        """Called before a step is recorded."""
        self.copies.before_recording()

    def before_replay(self) -> None:
        """Called before a step that was recorded is replayed."""
        self.copies.before_replay()

    def recording_failed(self) -> None:
        """Called where a step could not be recorded to its end."""
        self.copies.recording_failed()

    def use(self) -> StreamUse:
        """What has been done so far."""
        return self.copies.use()

    def close(self) -> None:
        """Unlock and release the host's memory; the decoder must not run any more."""
        self.copies.close()

    def _hook_steps(self, decoder: Decoder) -> None:
        decoder.register_forward_pre_hook(lambda *_: self.copies.begin())
        decoder.register_forward_hook(lambda *_: self.copies.end())

    def _hook(self, layer: nn.Module, position: int) -> None:
        def before(*_: object) -> None:
            self.copies.acquire(position, 0)

        def after(*_: object) -> None:
            self.copies.release(position, 0)

        layer.register_forward_pre_hook(before)
        # Also where the layer fails, or its slot would never be free.
        layer.register_forward_hook(after, always_call=True)
