"""Streamed layers on a CPU: the same tokens as resident ones, in the order that was planned.

Slots that are given back are filled with NaN, so whoever read one too early or too late would show.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from conclave.kernels.formats import Format
from conclave.worker.memory.residency import least
from conclave.worker.memory.streaming.copies import Copies

from .decoders import Streamed

Checkpoint = Callable[[int | str], Path]
PLAIN, SPARSE, INT4 = None, Format.parse("5:16-int4-g32"), Format.parse("dense-int4-g32")


@pytest.mark.parametrize(
    ("variant", "format", "dtype"),
    [
        ("1", PLAIN, torch.float32),
        ("1", PLAIN, torch.bfloat16),
        ("4", SPARSE, torch.float32),
        ("1", INT4, torch.bfloat16),
        ("5", SPARSE, torch.bfloat16),
        ("6", PLAIN, torch.float32),
    ],
)
def test_tokens_are_those_of_resident_layers(
    variant: str, format: Format | None, dtype: torch.dtype, tiny_checkpoint: Checkpoint
) -> None:
    folder = tiny_checkpoint(variant)
    resident = Streamed(folder, format, dtype=dtype)
    wanted = [resident.logits(length) for length in (11, 1)]
    blocks = resident.stream.residency.blocks
    for ahead, share in product((0, 1, 2), (0.0, 0.5, 1.0)):
        least_bytes = least(blocks, ahead)
        room = least_bytes + int(share * (sum(blocks) - 1 - least_bytes))
        streamed = Streamed(folder, format, ahead, room, dtype)
        assert streamed.stream.residency.streamed
        for _ in range(3):
            for length, expected in zip((11, 1), wanted, strict=True):
                assert torch.equal(streamed.logits(length), expected)


def test_copies_come_when_they_were_planned(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fill, acquire = Copies._fill, Copies.acquire

    def told_fill(self: Copies, position: int, part: int) -> None:
        seen.append(f"copy {position}")
        fill(self, position, part)

    def told_acquire(self: Copies, position: int, part: int) -> None:
        seen.append(f"run {position}")
        acquire(self, position, part)

    monkeypatch.setattr(Copies, "_fill", told_fill)
    monkeypatch.setattr(Copies, "acquire", told_acquire)
    folder = tiny_checkpoint("1")
    blocks = Streamed(folder).stream.residency.blocks
    ahead = Streamed(folder, room=least(blocks, 1), ahead=1)
    assert ahead.stream.residency.slots == 2 and len(ahead.stream.residency.streamed) == 6
    assert seen == ["copy 0", "copy 1"]
    step = [word for each in range(6) for word in (f"run {each}", f"copy {(each + 2) % 6}")]
    for _ in range(2):
        seen.clear()
        ahead.logits(3)
        assert seen == step
    use = ahead.stream.use()
    assert use.copied_bytes == ahead.stream.residency.copied * 2 + sum(blocks[:2])
    seen.clear()
    demand = Streamed(folder, room=least(blocks, 0), ahead=0)
    assert seen == []
    demand.logits(3)
    assert seen == [word for each in range(6) for word in (f"run {each}", f"copy {each}")]
    assert demand.stream.use().stalled_seconds > 0


def test_a_slot_that_is_given_back_is_nan(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    blocks = Streamed(folder).stream.residency.blocks
    demand = Streamed(folder, room=least(blocks, 0), ahead=0)
    assert demand.logits(3).isfinite().all()
    weight = demand.decoder.get_parameter("layers.5.feed_forward.mlp.down.weight")
    assert weight.isnan().all()
    assert demand.decoder.get_parameter("layers.5.attention.head_norms").isfinite().all()


def test_a_step_that_fails_leaves_the_next_one_right(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    resident = Streamed(folder)
    blocks = resident.stream.residency.blocks
    for ahead in (0, 1):
        streamed = Streamed(folder, room=least(blocks, ahead), ahead=ahead)
        for layer in (0, 3, 5):
            handle = streamed.decoder.get_submodule(
                f"layers.{layer}.attention"
            ).register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                streamed.logits(4)
            handle.remove()
            assert torch.equal(streamed.logits(4), resident.logits(4))


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")
