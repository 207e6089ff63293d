"""How long a step takes on a device whose rates are known, and what limits it: arithmetic alone.

A step reads the stored weights once, multiplies by them for every token, and waits for what is
streamed (`timeline` tells when), or for the experts that it lacks: of these there is but an
expectation. What is coded is read, and written out, before; its size is the one that was planned,
of which a step of bfloat16 copies 2 to 3 % less. What it gave up: attention over long contexts and
the cache's own reading, so a step of many tokens in long contexts takes longer.
"""

from dataclasses import dataclass

from ..model.config import LayerConfig, ModelConfig
from ..model.storage import LayerStorage, Storage
from .experts.slots import ExpertSlots
from .residency import Residency


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second."""

    link: float
    """Bytes copied from locked host memory."""
    memory: float
    """Bytes of weights that kernels read at one token."""
    compute: float
    """Floating-point operations of products of many tokens."""
    overhead: float = 20e-6
    """Seconds of a layer beside its large weights: norms, attention, launches."""


OF_COPY = 0.63
"""What kernels read of weights, over what a copy on the device reads and writes: the linears of a
31B layer in 5:16 int4 at one token (docs/log.md)."""
DECODES = 0.77
"""The same of kernels that decode (an H100): bfloat16, and 5:16 int4 at most shapes."""
BY_PROCESSORS = 35 / 55
"""Of the link's rate, what processors reach that fetch experts by themselves (an H100)."""
FORESEEN = 0.85
"""Of the experts that a step lacks, those that are fetched ahead, as the next layer's router makes
them of this layer's residual: by what others have published (80 to 90 %)."""
H100 = Rates(link=54e9, memory=OF_COPY * 2.9e12, compute=6.5e14)
"""An H100 on PCIe gen5, for where there is none."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The time of one step."""

    tokens: int
    compute: float
    """Seconds, were all weights resident."""
    transfer: float
    """Seconds that the link is busy."""
    overlapped: bool
    decode: float = 0.0
    """Seconds before layers that are kept coded run."""
    foreseen: float = 1.0
    """Of what is transferred, the part that can be while others compute."""

    @property
    def seconds(self) -> float:
        """The longer one where copies run during compute, else their sum."""
        return self._ahead if self.overlapped else self.busy + self.transfer

    @property
    def busy(self) -> float:
        """Seconds of computing and decoding."""
        return self.compute + self.decode

    @property
    def _ahead(self) -> float:
        return max(self.busy + (1 - self.foreseen) * self.transfer, self.transfer)

    @property
    def limit(self) -> str:
        """What more of would make it faster first."""
        return "link" if self.transfer > self.busy else "compute"

    @property
    def gain(self) -> float:
        """Of prefetch over copying on demand; 2 at most, where both take equally long."""
        return (self.busy + self.transfer) / self._ahead


def forecast(
    model: ModelConfig,
    storage: Storage,
    residency: Residency,
    ahead: int,
    tokens: int,
    rates: Rates,
    slots: ExpertSlots | None = None,
) -> Forecast:
    """One step of so many tokens; with `slots`, by the hit rate that is assumed of these."""
    layers, head = computing(model, storage, tokens, rates)
    if slots is not None:
        own = model.layers[slots.layers[0]].experts
        assert own is not None
        copied = slots.missing(own.active, tokens) * slots.expert_bytes
        transfer = copied / (rates.link * BY_PROCESSORS)
        return Forecast(tokens, head + sum(layers), transfer, ahead > 0, foreseen=FORESEEN)
    decode, transfer = sum(decoding(storage, residency, rates)), residency.copied / rates.link
    return Forecast(tokens, head + sum(layers), transfer, ahead > 0, decode)


def computing(
    model: ModelConfig, storage: Storage, tokens: int, rates: Rates
) -> tuple[list[float], float]:
    """Seconds of each layer, weights at hand, and of the head, in bfloat16 and read once.

    So few of the tokens are scored.
    """
    layers = zip(model.layers, storage.layers, strict=True)
    head = 2 * model.vocab_size * model.hidden_size / rates.memory
    return [_seconds(*each, tokens, rates) for each in layers], head


def decoding(storage: Storage, residency: Residency, rates: Rates) -> list[float]:
    """Seconds in which each layer is decoded; empty if none is coded."""
    if not residency.working:
        return []
    layers = zip(residency.blocks, storage.layers, strict=True)
    rate = DECODES / OF_COPY * rates.memory
    return [(coded + layer.block) / rate for coded, layer in layers]


def balance(
    model: ModelConfig, storage: Storage, residency: Residency, rates: Rates, most: int = 1 << 16
) -> int | None:
    """Tokens of a step at which computing takes as long as copying, where prefetch gains most.

    None if nothing is streamed, one token computes for longer already, or `most` do not.
    """

    def computes_longer(tokens: int) -> bool:
        found = forecast(model, storage, residency, 1, tokens, rates)
        return found.busy >= found.transfer

    if not residency.streamed or computes_longer(1) or not computes_longer(most):
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if computes_longer(middle) else (middle, high)
    return high


def _seconds(layer: LayerConfig, stored: LayerStorage, tokens: int, rates: Rates) -> float:
    """Of one layer, all its weights at hand."""
    each = 0.0 if layer.experts is None else layer.experts.active / layer.experts.count
    read = stored.read(tokens, layer.experts)
    operations = 2 * tokens * (stored.weights + stored.expert_weights * each)
    return max(read / rates.memory, operations / rates.compute) + rates.overhead
