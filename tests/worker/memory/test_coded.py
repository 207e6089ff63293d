"""Layers that are kept coded, on a CPU: the same tokens as plain resident ones, from one slot.

Slots that are given back are filled with NaN, the working one after each module, so whoever read
one too late would show; a module that was not decoded whole would show by other tokens.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conclave.kernels.formats import Format
from conclave.kernels.lossless.codes import decode
from conclave.worker.memory.residency import least
from conclave.worker.memory.streaming.coded import CodedStream
from conclave.worker.memory.streaming.copies import Copies
from conclave.worker.model.packed import large_tensors

from .decoders import Streamed

Checkpoint = Callable[[int | str], Path]
PLAIN, SPARSE, INT8 = None, Format.parse("5:16-int4-g32"), Format.parse("8:16-int8-g32")
BF16 = torch.bfloat16


def least_coded(model: Streamed, ahead: int) -> int:
    """Bytes of the fewest coded layers on the device, with the working slot."""
    coded = [layer.coded for layer in model.storage.layers]
    return model.storage.largest_module + least(coded, max(0, ahead - 1))


@pytest.mark.parametrize(
    ("variant", "format", "dtype"),
    [
        ("1", PLAIN, BF16),
        ("4", SPARSE, torch.float32),
        ("5", SPARSE, BF16),
        ("4", INT8, BF16),
        ("6", PLAIN, BF16),
        ("6-wide", SPARSE, BF16),
    ],
)
def test_tokens_are_those_of_plain_layers(
    variant: str, format: Format | None, dtype: torch.dtype, tiny_checkpoint: Checkpoint
) -> None:
    folder = tiny_checkpoint(variant)
    plain = Streamed(folder, format, dtype=dtype)
    wanted = [plain.logits(length) for length in (11, 1)]
    coded = sum(layer.coded for layer in plain.storage.layers)
    for ahead, share in product((0, 1, 2, 3), (0.0, 0.4, 0.8, 1.0)):
        low = least_coded(plain, ahead)
        high = plain.storage.largest_module + coded
        streamed = Streamed(folder, format, ahead, low + int(share * (high - low)), dtype, True)
        residency = streamed.stream.residency
        assert isinstance(streamed.stream, CodedStream)
        assert residency.working == plain.storage.largest_module
        assert bool(residency.streamed) == (share < 1)
        for _ in range(3):
            for length, expected in zip((11, 1), wanted, strict=True):
                assert torch.equal(streamed.logits(length), expected), (ahead, share)
        use = streamed.stream.use()
        assert use.coded and use.host_bytes == residency.copied
        primed = use.copied_bytes - 6 * residency.copied
        assert 0 <= primed < max(1, residency.copied)


def test_a_slot_is_free_when_the_last_module_of_its_layer_is_decoded(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fill, acquire, decode_own = Copies._fill, Copies.acquire, CodedStream._decode

    def told_fill(self: Copies, position: int) -> None:
        seen.append(f"copy {position}")
        fill(self, position)

    def told_acquire(self: Copies, position: int) -> torch.Tensor:
        seen.append(f"begin {position}")
        return acquire(self, position)

    def told_decode(self: CodedStream, own: Any, layer: int) -> None:
        decode_own(self, own, layer)
        seen.append(f"run {layer}")

    monkeypatch.setattr(Copies, "_fill", told_fill)
    monkeypatch.setattr(Copies, "acquire", told_acquire)
    monkeypatch.setattr(CodedStream, "_decode", told_decode)
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    ahead = Streamed(folder, ahead=2, room=least_coded(plain, 2), dtype=BF16, coded=True)
    assert ahead.stream.residency.slots == 2 and len(ahead.stream.residency.streamed) == 6
    assert seen == ["copy 0", "copy 1"]
    step = []
    for each in range(6):
        run = f"run {each}"
        step += [f"begin {each}", *[run] * 3, f"copy {(each + 2) % 6}", run]
    for _ in range(2):
        seen.clear()
        ahead.logits(3)
        assert seen == step
    demand = Streamed(folder, ahead=0, room=least_coded(plain, 0), dtype=BF16, coded=True)
    seen.clear()
    demand.logits(3)
    step = []
    for each in range(6):
        step += [f"begin {each}", f"copy {each}", *[f"run {each}"] * 4]
    assert seen == step
    assert demand.stream.use().stalled_seconds > 0


def test_all_modules_run_from_one_slot(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    assert coded.logits(3).isfinite().all()
    weights = [weight for layer in coded.decoder.layers for weight in large_tensors(layer)]
    assert len(weights) == 6 * 4 and all(weight.isnan().all() for weight in weights)  # nobody runs
    assert len({weight.data_ptr() for weight in weights}) == 1
    size = max(weight.nbytes for weight in weights)
    assert weights[0].untyped_storage().nbytes() == coded.stream.residency.working == size
    assert coded.decoder.get_parameter("layers.5.attention.head_norms").isfinite().all()


@pytest.mark.parametrize("where", ["attention.qkv", "attention", "feed_forward.mlp.down", ""])
def test_a_step_that_fails_leaves_the_next_one_right(
    where: str, tiny_checkpoint: Checkpoint
) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    for ahead in (0, 2):
        room = least_coded(plain, ahead)
        coded = Streamed(folder, ahead=ahead, room=room, dtype=BF16, coded=True)
        for layer in (0, 3, 5):
            module = coded.decoder.layers[layer].get_submodule(where)
            handle = module.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                coded.logits(4)
            handle.remove()
            assert torch.equal(coded.logits(4), plain.logits(4))


def test_decoding_that_fails_leaves_the_next_step_right(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = tiny_checkpoint("1"), "conclave.worker.memory.streaming.coded.decode"
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    for before in (0, 1, 6):
        calls = iter([*[decode] * before, fail])
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *own, calls=calls: next(calls)(*own))
            with pytest.raises(RuntimeError, match="on purpose"):
                coded.logits(4)
        assert torch.equal(coded.logits(4), plain.logits(4))


def test_a_layer_whose_modules_do_not_all_run_frees_its_slot(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    for model, layer in product((plain, coded), (2, 3)):
        model.decoder.set_submodule(f"layers.{layer}.feed_forward", nn.Identity())
    for _ in range(2):
        assert torch.equal(coded.logits(4), plain.logits(4))
    use, slots = coded.stream.use(), coded.stream.residency.slots
    assert use.copied_bytes == sum(coded.stream.residency.blocks[:slots]) + 2 * use.host_bytes


def test_a_module_that_runs_without_its_layer_is_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    with pytest.raises(AssertionError, match="without its layer"):
        coded.decoder.get_submodule("layers.0.attention.out")(torch.zeros(1, 64))


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")
