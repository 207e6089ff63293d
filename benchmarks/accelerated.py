"""How fast accelerate runs a model of the same shape in bfloat16 from the host, for comparison.

A few layers of the real size are measured, each by itself, and taken times the real number of them:
accelerate copies a module when it is called and waits for it, so layers do not overlap. Under a
budget it keeps as many layers as fit.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

_PASSES = 3


class Offloaded(NamedTuple):
    """Seconds of one step, by part."""

    layer: float
    """Of a layer that comes from the host."""
    resident: float
    """Of a layer that stays."""
    rest: float
    """Of everything else, which stays."""

    def step(self, layers: int, streamed: int) -> float:
        """Of so many layers, some of them from the host."""
        return self.rest + streamed * self.layer + (layers - streamed) * self.resident


def measure(settings: dict[str, Any], batch: int) -> Offloaded:
    """With the layers that `settings`, a config.json, has. ImportError without accelerate."""
    import transformers
    from accelerate import cpu_offload

    config = transformers.Gemma4TextConfig(**settings)
    with torch.device("meta"):
        model: Any = transformers.Gemma4ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    model.tie_weights()
    layers = model.model.layers
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head, model.model.rotary_emb):
        part.to("cuda")
    tokens = torch.full((batch, 1), 7, device="cuda")
    for layer in layers:
        cpu_offload(layer, execution_device=torch.device("cuda"))
    offloaded, rest = _times(model, layers, tokens)
    for layer in layers:
        _stay(layer)
    resident, _ = _times(model, layers, tokens)
    return Offloaded(offloaded, resident, rest)


def _stay(layer: Any) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(layer, recurse=True)
    layer.to_empty(device="cuda")


def _times(model: Any, layers: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """Median seconds of a layer, and of all the rest."""
    found: list[float] = []
    begun: list[float] = []

    def begin(*_: object) -> None:
        torch.cuda.synchronize()
        begun.append(time.perf_counter())

    def end(*_: object) -> None:
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begun.pop())

    handles = [
        handle
        for layer in layers
        for handle in (layer.register_forward_pre_hook(begin), layer.register_forward_hook(end))
    ]
    whole = []
    with torch.inference_mode():
        for _ in range(_PASSES):
            found.clear()
            whole.append(_seconds(lambda: model(tokens, use_cache=False)) - sum(found))
    for handle in handles:
        handle.remove()
    return median(found), min(whole)


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start
