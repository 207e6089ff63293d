"""Layers that are kept coded, on a CPU: the same tokens as plain resident ones, from one slot.

Parts that are given back are filled with NaN, the working slot after each module, so whoever read
one too late would show, or bytes that were not copied; a module that was not decoded whole would
show by other tokens.
"""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conclave.kernels.formats import Format
from conclave.kernels.layouts import pack
from conclave.kernels.lossless.codes import decode
from conclave.worker.memory import residency as residencies
from conclave.worker.memory.residency import choose_coded
from conclave.worker.memory.streaming.coded import CodedStream, _Module
from conclave.worker.memory.streaming.copies import Copies
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.packed import large_tensors
from conclave.worker.weights import load_decoder

from .decoders import CPU, Streamed, logits_of

Checkpoint = Callable[[int | str], Path]
PLAIN, SPARSE, INT8 = None, Format.parse("5:16-int4-g32"), Format.parse("8:16-int8-g32")
BF16 = torch.bfloat16
SLOTS = {0: 1, 1: 1, 2: 1, 3: 2}
"""Of layers copied ahead, where there are many layers."""
MODULES = ("attention.qkv", "attention.out", "feed_forward.mlp.gate_up", "feed_forward.mlp.down")


def least_coded(model: Streamed, ahead: int) -> int:
    """Bytes of the fewest coded layers on the device, with the working slot."""
    coded = [layer.coded_modules for layer in model.storage.layers]
    return residencies.least_coded(coded, model.storage.largest_module, ahead)


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
        assert share or residency.slots == SLOTS[ahead]
        for _ in range(3):
            for length, expected in zip((11, 1), wanted, strict=True):
                assert torch.equal(streamed.logits(length), expected), (ahead, share)
        use = streamed.stream.use()
        assert use.coded and use.host_bytes <= residency.copied
        # Only the code of bfloat16 may end without use, which is then not copied.
        shorter = use.host_bytes < residency.copied
        assert shorter == (format is None and bool(residency.streamed))
        primed = use.copied_bytes - 6 * use.host_bytes
        assert 0 <= primed < max(1, use.host_bytes)


def test_a_part_is_copied_as_soon_as_the_one_before_it_is_decoded(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fill, acquire, decode_own = Copies._fill, Copies.acquire, CodedStream._decode

    def told_fill(self: Copies, position: int, part: int) -> None:
        seen.append(f"copy {position}.{part}")
        fill(self, position, part)

    def told_acquire(self: Copies, position: int, part: int) -> None:
        seen.append(f"need {position}.{part}")
        acquire(self, position, part)

    def told_decode(self: CodedStream, own: Any, layer: int, part: int) -> None:
        decode_own(self, own, layer, part)
        seen.append(f"run {layer}.{part}")

    monkeypatch.setattr(Copies, "_fill", told_fill)
    monkeypatch.setattr(Copies, "acquire", told_acquire)
    monkeypatch.setattr(CodedStream, "_decode", told_decode)
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    for depth in (1, 2, 3):
        seen.clear()
        room = least_coded(plain, depth)
        ahead = Streamed(folder, ahead=depth, room=room, dtype=BF16, coded=True)
        slots = ahead.stream.residency.slots
        assert slots == SLOTS[depth] and len(ahead.stream.residency.streamed) == 6
        assert seen == [f"copy {each}.{part}" for each in range(slots) for part in range(4)]
        step = []
        for each, part in product(range(6), range(4)):
            step += [f"need {each}.{part}", f"copy {(each + slots) % 6}.{part}"]
            step += [f"run {each}.{part}"]
        for _ in range(2):
            seen.clear()
            ahead.logits(3)
            assert seen == step
    demand = Streamed(folder, ahead=0, room=least_coded(plain, 0), dtype=BF16, coded=True)
    seen.clear()
    demand.logits(3)
    step = []
    for each, part in product(range(6), range(4)):
        step += [f"{what} {each}.{part}" for what in ("need", "copy", "run")]
    assert seen == step
    assert demand.stream.use().stalled_seconds > 0


def test_the_next_layer_comes_while_this_one_runs(tiny_checkpoint: Checkpoint) -> None:
    """Before each module of layer 2 runs: which layers the parts of the only slot are of."""
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    seen: list[list[int | None]] = []

    def look(*_: object) -> None:
        seen.append([place.position for place in coded.stream.copies._places()])

    for name in MODULES:
        coded.decoder.layers[2].get_submodule(name).register_forward_pre_hook(look)
    coded.logits(3)
    assert seen == [[3, 2, 2, 2], [3, 3, 2, 2], [3, 3, 3, 2], [3, 3, 3, 3]]


@pytest.mark.parametrize(("variant", "larger"), [("1", False), ("4", True)])
def test_parts_lie_at_the_same_places_for_all_layers(
    variant: str, larger: bool, tiny_checkpoint: Checkpoint
) -> None:
    """Also where the largest parts are not those of one layer: then slots are larger than any."""
    folder = tiny_checkpoint(variant)
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, ahead=3, room=least_coded(plain, 3), dtype=BF16, coded=True)
    residency, copies = coded.stream.residency, coded.stream.copies
    parts = [residency.parts[layer] for layer in residency.streamed]
    assert len(set(parts)) > 1 and residency.slots == 2
    assert residency.slot_parts == tuple(max(sizes) for sizes in zip(*parts, strict=True))
    assert (residency.slot_bytes > max(map(sum, parts))) == larger
    for position, sizes in enumerate(parts):
        begin = copies.memory(position % 2, 0).data_ptr()
        for part, size in enumerate(sizes):
            memory = copies.memory(position, part)
            assert size <= len(memory) == residency.slot_parts[part]
            assert memory.data_ptr() == begin
            begin += len(memory)


@pytest.mark.parametrize(
    ("text", "order", "ends"),
    [("8:16-bf16", [1, 0], True), ("5:16-int4-g32", [0], False), ("8:16-int8-g32", [0], False)],
)
def test_only_the_end_of_a_part_is_without_use(text: str, order: list[int], ends: bool) -> None:
    """Plain tensors come first, a code of bfloat16 last; decoding needs no more than is used."""
    format = Format.parse(text)
    found = pack(torch.randn(256, 256), format).tensors()
    kept = {name: tensor.clone() for name, tensor in found.items()}
    module = _Module((name, format, tensor) for name, tensor in found.items())
    part = torch.zeros(module.size, dtype=torch.uint8)
    size = module.fill(part)
    offsets = [own.offset for own in module._coded]
    assert sorted(range(len(offsets)), key=offsets.__getitem__) == order
    assert min(offsets) == module._rest_bytes
    assert size % 256 == 0 and 0 < size <= module.size and (size < module.size) == ends
    part[size:] = 0xFF
    working = torch.full((module.bytes,), 0xFF, dtype=torch.uint8)
    module.settle(part, working)
    module.decode()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


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


@pytest.mark.parametrize("where", [*MODULES, "attention", ""])
def test_a_step_that_fails_leaves_the_next_one_right(
    where: str, tiny_checkpoint: Checkpoint
) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    wanted = plain.logits(4)
    for ahead in (0, 2, 3):
        room = least_coded(plain, ahead)
        coded = Streamed(folder, ahead=ahead, room=room, dtype=BF16, coded=True)
        for layer in (0, 3, 5):
            module = coded.decoder.layers[layer].get_submodule(where)
            handle = module.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                coded.logits(4)
            handle.remove()
            assert torch.equal(coded.logits(4), wanted)
            copied = coded.stream.use().copied_bytes
            assert torch.equal(coded.logits(4), wanted)
            use = coded.stream.use()
            assert use.copied_bytes - copied == use.host_bytes


def test_decoding_that_fails_leaves_the_next_step_right(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = tiny_checkpoint("1"), "conclave.worker.memory.streaming.coded.decode"
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    for before in range(9):
        calls = iter([*[decode] * before, fail])
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *own, calls=calls: next(calls)(*own))
            with pytest.raises(RuntimeError, match="on purpose"):
                coded.logits(4)
        assert torch.equal(coded.logits(4), plain.logits(4))


class Skipped(nn.Module):
    """In place of a feed-forward: has no weights, and gives the residual back."""

    input_norms: Sequence[nn.Module] = ()

    def forward(self, residual: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return residual


def test_a_layer_whose_modules_do_not_all_run_frees_its_slot(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    for model, layer in product((plain, coded), (2, 3)):
        model.decoder.set_submodule(f"layers.{layer}.feed_forward", Skipped())
    copied = coded.stream.use().copied_bytes
    for _ in range(2):
        assert torch.equal(coded.logits(4), plain.logits(4))
    use = coded.stream.use()
    assert use.copied_bytes - copied == 2 * use.host_bytes


def test_a_layer_with_fewer_modules_has_parts_of_no_bytes(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    sizes = [layer.coded_modules for layer in plain.storage.layers]
    sizes[2], blocks = sizes[2][:2], [layer.block for layer in plain.storage.layers]
    plain.decoder.set_submodule("layers.2.feed_forward", Skipped())
    working = plain.storage.largest_module
    for ahead in (0, 2, 3):
        room = residencies.least_coded(sizes, working, ahead)
        residency = choose_coded(blocks, sizes, working, room, ahead)
        assert residency is not None and residency.parts[2][2:] == (0, 0)
        stream = CodedStream(residency, CPU, prefetch=ahead > 0, poison=True)
        decoder = load_decoder(
            *(folder, ModelConfig.load(folder), CPU, BF16), settle=shortened(stream)
        )
        stream.start(decoder)
        for _ in range(3):
            assert torch.equal(logits_of(decoder, torch.arange(5, 9), 4), plain.logits(4))


def shortened(stream: CodedStream) -> Callable[[Decoder, int], None]:
    """Takes layers, the third one without its MLP."""

    def settle(decoder: Decoder, layer: int) -> None:
        if layer == 2:
            decoder.set_submodule("layers.2.feed_forward", Skipped())
        stream.take(decoder, layer)

    return settle


def test_a_module_that_runs_without_its_layer_is_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("1")
    plain = Streamed(folder, dtype=BF16)
    coded = Streamed(folder, room=least_coded(plain, 2), dtype=BF16, coded=True)
    with pytest.raises(AssertionError, match="without its layer"):
        coded.decoder.get_submodule("layers.0.attention.out")(torch.zeros(1, 64))


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")
