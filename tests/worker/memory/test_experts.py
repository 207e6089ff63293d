"""Single experts in slots, on a CPU: the same numbers as resident ones, whatever was foreseen.

A slot is filled with NaN before another expert comes, so whoever read one too late would show.
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref as weakref

import pytest
import torch

from conclave.kernels.formats import Format
from conclave.worker.memory.experts.cache import ExpertCache
from conclave.worker.memory.experts.module import SlottedExperts
from conclave.worker.memory.experts.slots import choose_slots, fewest_slots
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.layers import Experts
from conclave.worker.model.packed import large_tensors, pack_decoder
from conclave.worker.weights import load_decoder

from .decoders import logits_of, storage

CPU = torch.device("cpu")
Checkpoint = Callable[[int | str], Path]
PLAIN, SPARSE, INT4 = None, Format.parse("5:16-int4-g32"), Format.parse("dense-int4-g32")


class Slotted:
    """A tiny model with so many slots for its experts; None lets all stay."""

    def __init__(
        self,
        folder: Path,
        format: Format | None = None,
        slots: int | None = None,
        predict: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = ModelConfig.load(folder)
        self.cache: ExpertCache | None = None
        self.loaded: list[weakref[torch.Tensor]] = []
        """The weights of experts, as they were before they went into slots."""
        if slots is not None:
            layers = storage(config, format, dtype).layers
            beside = sum(layer.block - layer.expert_block for layer in layers)
            least = fewest_slots(layers)
            assert least is not None
            chosen = choose_slots(layers, beside + slots * least.expert_bytes)
            assert chosen is not None and chosen.slots == slots
            self.cache = ExpertCache(chosen, CPU, predict, poison=True)

        def settle(decoder: Decoder, layer: int) -> None:
            if format is not None:
                pack_decoder(decoder, format, layer)
            own = decoder.get_submodule(f"layers.{layer}.feed_forward").experts
            if self.cache is not None and isinstance(own, Experts):
                self.loaded += map(weakref, large_tensors(own))
            if self.cache is not None:
                self.cache.take(decoder, layer)

        self.decoder = load_decoder(folder, config, CPU, dtype, settle=settle)
        if self.cache is not None:
            self.cache.start(self.decoder)

    def logits(self, length: int, first: int = 5) -> torch.Tensor:
        """float32 [length, vocab], of some tokens."""
        return logits_of(self.decoder, torch.arange(first, first + length), length)


@pytest.mark.parametrize(
    ("variant", "format", "dtype"),
    [
        ("6", PLAIN, torch.float32),
        ("6", PLAIN, torch.bfloat16),
        ("7", PLAIN, torch.float32),
        ("6-wide", SPARSE, torch.float32),
        ("6-wide", INT4, torch.bfloat16),
    ],
)
def test_tokens_are_those_of_resident_experts(
    variant: str, format: Format | None, dtype: torch.dtype, tiny_checkpoint: Checkpoint
) -> None:
    folder = tiny_checkpoint(variant)
    resident = Slotted(folder, format, dtype=dtype)
    steps = [(length, first) for first in (5, 90) for length in (11, 1, 1, 1)]
    wanted = [resident.logits(*step) for step in steps]
    count = fewest_slots(storage(resident.decoder.config, format, dtype).layers)
    assert count is not None
    for slots, predict in ((count.experts, True), (count.experts, False), (20, True), (20, False)):
        slotted = Slotted(folder, format, slots, predict, dtype)
        for step, expected in zip(steps * 2, wanted * 2, strict=True):
            assert expected.isfinite().all()
            assert torch.equal(slotted.logits(*step), expected)
        assert slotted.cache is not None
        use = slotted.cache.use()
        assert use.misses > 0 and (slots == count.experts or use.hits > 0)
        assert predict or use.foreseen == 0
        each = use.fetched_bytes // (use.misses + use.foreseen)
        assert use.wasted_bytes == (use.foreseen - use.foreseen_used) * each
        assert use.host_bytes == count.host_bytes


@pytest.mark.parametrize(("variant", "format"), [("6", PLAIN), ("6-wide", SPARSE)])
def test_nothing_else_keeps_the_experts(
    variant: str, format: Format | None, tiny_checkpoint: Checkpoint
) -> None:
    slotted = Slotted(tiny_checkpoint(variant), format, slots=20)
    gc.collect()
    assert slotted.loaded and not any(own() is not None for own in slotted.loaded)


def test_slots_hold_what_the_table_says(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("6")
    slotted, resident = Slotted(folder, slots=11), Slotted(folder)
    for first in (5, 50, 200):
        slotted.logits(3, first)
    assert slotted.cache is not None
    table = slotted.cache.table
    experts = modules(slotted.decoder)[0]  # all run from the same slots
    for slot, owner in enumerate(table.owner.tolist()):
        layer, expert = divmod(owner, 8)
        assert table.slot_of[owner] == slot
        name = f"layers.{layer}.feed_forward.experts"
        for part in ("gate_up", "down"):
            stays = resident.decoder.get_parameter(f"{name}.{part}")[expert]
            assert torch.equal(getattr(experts, part)[slot], stays)


def modules(decoder: Decoder) -> list[SlottedExperts]:
    return [each for each in decoder.modules() if isinstance(each, SlottedExperts)]


def test_a_step_that_fails_leaves_the_next_one_right(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("6")
    resident, slotted = Slotted(folder), Slotted(folder, slots=8)
    for place in ("2.attention", "2.feed_forward.mlp", "3.feed_forward.experts.router", "5"):
        module = slotted.decoder.get_submodule(f"layers.{place}")
        handle = module.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            slotted.logits(4)
        handle.remove()
        assert torch.equal(slotted.logits(4), resident.logits(4))


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")


def given(own: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return own


def test_what_was_foreseen_is_not_fetched_again(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prophet's guesses: every expert but the first layer's comes ahead, and is used."""
    folder = tiny_checkpoint("6")
    slotted, resident = Slotted(folder, slots=12), Slotted(folder)
    chosen: list[torch.Tensor] = []
    for layer in resident.decoder.layers:
        experts = layer.get_submodule("feed_forward.experts")
        route = experts.route
        experts.route = told(route, chosen)
    resident.logits(1)
    for module, own in zip(modules(slotted.decoder), chosen, strict=True):
        monkeypatch.setattr(module, "foresee", partial(given, own))
    slotted.logits(1)
    assert slotted.cache is not None
    use = slotted.cache.use()
    assert (use.misses, use.hits, use.foreseen, use.foreseen_used) == (2, 10, 10, 10)
    assert use.wasted_bytes == 0


def told(route: Any, chosen: list[torch.Tensor]) -> Any:
    def routed(residual: torch.Tensor) -> Any:
        found = route(residual)
        chosen.append(found[1])
        return found

    return routed
