"""Layers that are kept coded, on a CPU: the same tokens as plain resident ones, from one slot.

The working slot and slots that are given back are filled with NaN, so whoever read one too late
would show; a layer that was not decoded whole would show by other tokens.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from conclave.kernels.formats import Format
from conclave.worker.memory.residency import least
from conclave.worker.memory.streaming.coded import CodedStream
from conclave.worker.memory.streaming.copies import Copies

from .decoders import Streamed

Checkpoint = Callable[[int | str], Path]
PLAIN, SPARSE, INT8 = None, Format.parse("5:16-int4-g32"), Format.parse("8:16-int8-g32")
BF16 = torch.bfloat16


def least_coded(model: Streamed, ahead: int) -> int:
    """Bytes of the fewest coded layers on the device, with the working slot."""
    coded = [layer.coded for layer in model.layers]
    return max(layer.block for layer in model.layers) + least(coded, max(0, ahead - 1))


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
    coded = sum(layer.coded for layer in plain.layers)
    for ahead, share in product((0, 1, 2, 3), (0.0, 0.4, 0.8, 1.0)):
        low = least_coded(plain, ahead)
        high = max(layer.block for layer in plain.layers) + coded
        streamed = Streamed(folder, format, ahead, low + int(share * (high - low)), dtype, True)
        residency = streamed.stream.residency
        assert isinstance(streamed.stream, CodedStream) and residency.working
        assert bool(residency.streamed) == (share < 1)
        for _ in range(3):
            for length, expected in zip((11, 1), wanted, strict=True):
                assert torch.equal(streamed.logits(length), expected), (ahead, share)
        use = streamed.stream.use()
        assert use.coded and use.host_bytes == residency.copied
        primed = use.copied_bytes - 6 * residency.copied
        assert 0 <= primed < max(1, residency.copied)


def test_a_slot_is_free_when_its_layer_is_decoded(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fill, acquire = Copies._fill, Copies.acquire
    decode = CodedStream._decode

    def told_fill(self: Copies, position: int) -> None:
        seen.append(f"copy {position}")
        fill(self, position)

    def told_acquire(self: Copies, position: int) -> torch.Tensor:
        seen.append(f"decode {position}")
        return acquire(self, position)

    def told_decode(self: CodedStream, layer: int) -> None:
        decode(self, layer)
        seen.append(f"run {layer}")

    monkeypatch.setattr(Copies, "_fill", told_fill)
    monkeypatch.setattr(Copies, "acquire", told_acquire)
    monkeypatch.setattr(CodedStream, "_decode", told_decode)
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    ahead = Streamed(folder, ahead=2, room=least_coded(plain, 2), dtype=BF16, coded=True)
    assert ahead.stream.residency.slots == 2 and len(ahead.stream.residency.streamed) == 6
    assert seen == ["copy 0", "copy 1"]
    step = [
        word
        for each in range(6)
        for word in (f"decode {each}", f"copy {(each + 2) % 6}", f"run {each}")
    ]
    for _ in range(2):
        seen.clear()
        ahead.logits(3)
        assert seen == step
    demand = Streamed(folder, ahead=0, room=least_coded(plain, 0), dtype=BF16, coded=True)
    seen.clear()
    demand.logits(3)
    assert seen == [
        word for each in range(6) for word in (f"decode {each}", f"copy {each}", f"run {each}")
    ]
    assert demand.stream.use().stalled_seconds > 0


def test_all_layers_run_from_one_slot(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    assert coded.logits(3).isfinite().all()
    name = "feed_forward.mlp.down.weight"
    weights = [coded.decoder.get_parameter(f"layers.{layer}.{name}") for layer in range(6)]
    assert all(weight.isnan().all() for weight in weights)  # nobody runs
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert coded.decoder.get_parameter("layers.5.attention.head_norms").isfinite().all()


def test_a_step_that_fails_leaves_the_next_one_right(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    for ahead in (0, 2):
        room = least_coded(plain, ahead)
        coded = Streamed(folder, ahead=ahead, room=room, dtype=BF16, coded=True)
        for layer in (0, 3, 5):
            module = coded.decoder.get_submodule(f"layers.{layer}.attention")
            handle = module.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                coded.logits(4)
            handle.remove()
            assert torch.equal(coded.logits(4), plain.logits(4))


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")
