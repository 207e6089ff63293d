"""Which linears multiply prompts as integers: those that can, less those that would be slower.

Each row of activations is held to an error (`kernels.integer.digits`). Where outliers keep to some
channels, as in what norms give, that costs a few blocks of second digits. What comes of gelu times
up has some in every block: twice the products, which is slower than bfloat16. So each linear is
asked once, by a probe of drawn tokens: the choice must not depend on what was asked before, or
answers would. It gave up what real text would say, which may be a linear or two more or less.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...kernels.integer.digits import to_digits
from ...kernels.integer.multiply import on_hopper, supports
from ...kernels.integer.weights import is_whole
from .decoder import Decoder, DenseAttention
from .packed import MANY, PackedGate, PackedLinear

log = logging.getLogger(__name__)

MOST_SECONDS = 0.2
"""Blocks with second digits, of all: with more, products of integers gain nothing (an H100)."""


def allow_integers(decoder: Decoder, layer: int, max_error: float) -> int:
    """Let linears of a layer multiply `MANY` tokens and more as integers, each within `max_error`.

    That is ||x - seen|| / ||x|| of each row of activations. Those do whose weights have whole
    scales, of a shape that there is a kernel for; returns how many.
    """
    found = 0
    for module in decoder.get_submodule(f"layers.{layer}").modules():
        if isinstance(module, PackedLinear | PackedGate):
            can = supports(module.weight) and is_whole(module.weight)
            module.error = max_error if can else None
            found += can
    return found


def choose_integers(decoder: Decoder, found: int, device: torch.device, dtype: torch.dtype) -> None:
    """`keep_the_faster` of the linears that were allowed to, and a word of what comes of it.

    Elsewhere than on Hopper, in another dtype than bfloat16, and with other weights, products stay
    exact.
    """
    if not on_hopper(device) or dtype != torch.bfloat16:
        text = "prompt_error changes nothing on %s in %s: that is for bfloat16 on Hopper cards"
        log.warning(text, device, dtype)
    elif not found:
        log.warning("prompt_error changes nothing: no weight has 4 bits and whole scales")
    else:
        kept = keep_the_faster(decoder, device)
        log.info("%d of %d linears with whole scales multiply prompts as integers", kept, found)


@torch.inference_mode()
def keep_the_faster(decoder: Decoder, device: torch.device) -> int:
    """Let those linears multiply as before that a probe finds too many second digits in.

    Runs `MANY` drawn tokens through the decoder, on a Hopper card; returns how many are left.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(decoder.config.vocabulary, (MANY,), generator=draw).to(device)
    probes = [_Probe(module) for module in _willing(decoder)]
    decoder(tokens, torch.arange(MANY, device=device), DenseAttention(decoder.config, [MANY]))
    for probe in probes:
        probe.decide()
    if device.type == "cuda":  # what the probe took; the cache comes after it
        torch.cuda.empty_cache()
    return sum(1 for _ in _willing(decoder))


def _willing(decoder: Decoder) -> Iterator[PackedLinear | PackedGate]:
    for module in decoder.layers.modules():
        if isinstance(module, PackedLinear | PackedGate) and module.error is not None:
            yield module


class _Probe:
    """Looks at what one linear is given."""

    def __init__(self, module: PackedLinear | PackedGate) -> None:
        self.module = module
        self.share: Tensor | None = None
        self._hook: RemovableHandle = module.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert self.module.error is not None
        marks = to_digits(given[0].contiguous(), self.module.error).marks
        self.share = marks[1:, 0].float().mean() / (marks.shape[1] // 2)

    def decide(self) -> None:
        self._hook.remove()
        if self.share is not None and float(self.share) > MOST_SECONDS:
            self.module.error = None
