"""Packing against a plain reading of the table in `kernels/formats.py`, byte by byte."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conclave.kernels import layouts
from conclave.kernels.errors import KernelError, KernelInputError, LayoutError
from conclave.kernels.formats import padded
from conclave.kernels.layouts import (
    Format,
    PackedWeight,
    codes_of,
    mask_of,
    pack,
    pack_codes,
    packed_bytes,
    rows_at,
    scales_of,
    unpack,
    validate,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [
    *("1:16-int4-g32", "5:16-int4-g128", "6:16-int4-g64", "15:16-int4-g32"),
    *("3:16-int8-g64", "8:16-int8-g128", "1:16-bf16", "5:16-bf16", "8:16-bf16"),
    *("dense-int4-g32", "dense-int4-g128", "dense-int8-g64"),
]


def random_weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def columns_for(format: Format, steps: int) -> int:
    return steps * max(16, format.group)


def value_at(packed: PackedWeight, row: int, column: int) -> float:
    """One weight of a single matrix, read as the table of `formats` tells."""
    format, (tile, row) = packed.format, divmod(row, 128)
    codes = packed.codes[tile]
    code: float = 0
    if format.dense and format.bits == 4:
        nibble = column % 8 // 2 + column % 2 * 4
        code = ((int(codes[column // 8, row]) >> 4 * nibble) & 15) - 8
    elif format.dense:
        code = int(codes[column, row])
    for slot in range(0 if format.dense else format.kept):
        raw = float(codes[column // 16, slot, row])
        if packed.positions is None:
            position, value = int(raw) & 15, float((int(raw) >> 4 ^ 8) - 8)
        else:
            pair = int(packed.positions[tile, column // 16, slot // 2, row])
            position, value = pair >> 4 * (slot % 2) & 15, raw
        if position == column % 16:
            code = value
    if packed.scales is None:
        return code
    return code * float(packed.scales[tile, column // format.group, row])


def same_bytes(left: PackedWeight, right: PackedWeight) -> bool:
    pairs = zip(left.tensors().values(), right.tensors().values(), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("text", FORMATS)
def test_bytes_lie_as_told(text: str) -> None:
    format = Format.parse(text)
    weight = random_weight(147, columns_for(format, 2))
    packed = pack(weight, format)
    validate(packed)
    dense, slots = unpack(packed), mask_of(packed)
    for row, column in product(range(0, 147, 21), range(weight.shape[1])):
        assert value_at(packed, row, column) == dense[row, column]
    assert dense[~slots].count_nonzero() == 0
    if not format.dense:
        assert (slots.unflatten(1, (-1, 16)).sum(-1) == format.kept).all()
    for name, tensor in packed.tensors().items():
        assert tensor.shape[-1] == 128, name
    empty = replace(packed, rows=256)
    assert unpack(empty)[147:].count_nonzero() == 0


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(FORMATS),
    rows=st.integers(1, 300),
    steps=st.integers(1, 5),
    experts=st.sampled_from([None, 1, 3]),
    block=st.sampled_from([1, 1 << 12, 1 << 22]),
    seed=st.integers(0, 99),
)
def test_round_trip(
    text: str, rows: int, steps: int, experts: int | None, block: int, seed: int
) -> None:
    format = Format.parse(text)
    columns = columns_for(format, steps)
    stack = () if experts is None else (experts,)
    weight = random_weight(*stack, rows, columns, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "BLOCK_WEIGHTS", block)
        packed = pack(weight, format)
        validate(packed)
        assert packed.nbytes == packed_bytes(format, rows, columns, experts or 1)
        assert (packed.experts, packed.tiles * 128) == (experts, padded(rows))
        for dtype in (torch.float32, torch.bfloat16):
            again = pack(unpack(packed, dtype), format, mask_of(packed), packed.scales)
            assert same_bytes(packed, again)
    for index in range(experts or 0):
        assert same_bytes(packed.expert(index), pack(weight[index], format))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", FORMATS)
def test_rows_alone(text: str, device: str) -> None:
    """In any order, twice, of the last tile or none; and all of them into given memory."""
    packed = pack(
        random_weight(300, columns_for(Format.parse(text), 2)).to(device), Format.parse(text)
    )
    whole = unpack(packed)
    for rows in ([299, 0, 128, 127, 0], [5], []):
        index = torch.tensor(rows, dtype=torch.int64, device=device)
        assert torch.equal(rows_at(packed, index), whole[index])
    given = torch.empty(whole.shape[::-1], dtype=torch.bfloat16, device=device).t()
    assert unpack(packed, out=given) is given and torch.equal(given, whole.bfloat16())
    for wrong in (given[:-1], given[:, :-1], given[None]):
        with pytest.raises(KernelInputError, match="out is"):
            unpack(packed, out=wrong)
    with pytest.raises(KernelInputError, match="single weight"):
        rows_at(packed, index[None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("columns", "group"), [(704, 64), (2112, 64), (5376, 128)])
def test_quantization_is_as_near_as_its_bits(columns: int, group: int, device: str) -> None:
    weight = random_weight(48, columns).to(device)
    for kept, bits, most in ((16, 4, 0.115), (16, 8, 0.0066), (5, 4, 0.11), (5, 8, 0.0066)):
        packed = pack(weight, Format(kept, bits, group))
        survivors = torch.where(mask_of(packed), weight.float(), 0.0)
        error = (unpack(packed) - survivors).norm() / survivors.norm()
        assert error < most, (packed.format, float(error))
        assert packed.device == weight.device


@pytest.mark.gpu
@pytest.mark.parametrize("text", FORMATS)
def test_gpu_packs_the_same_bytes(text: str) -> None:
    format = Format.parse(text)
    weight = random_weight(2, 50, columns_for(format, 3))
    packed = pack(weight.cuda(), format)
    assert same_bytes(packed.to("cpu"), pack(weight, format))
    assert torch.equal(unpack(packed).cpu(), unpack(packed.to("cpu")))


def test_largest_survive() -> None:
    weight = random_weight(32, 64)
    kept = mask_of(pack(weight, Format.parse("5:16-bf16"))).unflatten(1, (-1, 16))
    size = weight.float().abs().unflatten(1, (-1, 16))
    least = torch.where(kept, size, torch.inf).amin(-1)
    assert (least >= torch.where(kept, 0.0, size).amax(-1)).all()


def test_exact_values() -> None:
    weight = random_weight(17, 48)
    mask = random_weight(17, 48, seed=1) > 0.6
    packed = pack(weight, Format(12, 16, 0), mask)
    assert torch.equal(unpack(packed, torch.bfloat16), torch.where(mask, weight, 0.0))


def test_what_bfloat16_cannot_hold_is_refused_if_it_survives() -> None:
    weight, mask = random_weight(17, 48, dtype=torch.float32), torch.zeros(17, 48).bool()
    weight[3, 5], mask[:, 7] = -3.4e38, True
    with pytest.raises(LayoutError, match="infinity; scale it down"):
        pack(weight, Format.parse("5:16-bf16"))
    assert unpack(pack(weight, Format.parse("5:16-bf16"), mask)).isfinite().all()
    weight[3, 5] = torch.finfo(torch.bfloat16).max
    assert unpack(pack(weight, Format.parse("5:16-bf16")))[3, 5] == weight[3, 5]


@pytest.mark.parametrize("text", ["5:16-bf16", "5:16-int4-g64", "dense-int8-g64"])
def test_no_gradient_goes_through(text: str) -> None:
    weight, format = torch.nn.Parameter(random_weight(16, 64).float()), Format.parse(text)
    scales = torch.nn.Parameter(torch.ones(1, 16)) if format.group else None
    packed = [pack(weight, format), pack(weight, format, scales=scales)]
    if scales is not None:
        own = torch.nn.Parameter(scales_of(packed[0]))
        packed.append(pack_codes(codes_of(packed[0]), format, own, mask_of(packed[0])))
    for made in packed:
        assert not any(tensor.requires_grad for tensor in made.tensors().values())


@pytest.mark.parametrize("text", ["5:16-int4-g64", "5:16-int8-g64"])
def test_groups_with_few_survivors_fill_up_with_zeros(text: str) -> None:
    weight, mask = random_weight(16, 64), torch.zeros(16, 64, dtype=torch.bool)
    mask[:, [3, 7]] = True
    packed = pack(weight, Format.parse(text), mask)
    validate(packed)
    slots, dense = mask_of(packed), unpack(packed)
    assert slots[:, :16].nonzero()[:, 1].view(16, 5).tolist() == [[0, 1, 2, 3, 7]] * 16
    assert slots[:, 16:32].nonzero()[:, 1].view(16, 5).tolist() == [[0, 1, 2, 3, 4]] * 16
    assert dense[~mask].count_nonzero() == 0 and dense[mask].count_nonzero() == 32
    assert same_bytes(packed, pack(dense, packed.format, mask, packed.scales))


def test_given_scales_are_used_and_padded() -> None:
    weight = random_weight(2, 20, 64)
    scales = torch.full((2, 2, 20), 0.5)
    packed = pack(weight, Format.parse("dense-int8-g32"), scales=scales)
    assert packed.scales is not None and (packed.scales[..., :20] == 0.5).all()
    assert packed.scales[..., 20:].count_nonzero() == 0
    assert torch.equal(unpack(packed), (weight.float() / 0.5).round() * 0.5)


@pytest.mark.parametrize("text", [text for text in FORMATS if "bf16" not in text])
@pytest.mark.parametrize("experts", [None, 3])
def test_codes_and_scales_there_and_back(text: str, experts: int | None) -> None:
    """Not a bit changes, be the scale zero, tiny or the largest there is."""
    format = Format.parse(text)
    stack = () if experts is None else (experts,)
    weight = pack(random_weight(*stack, 200, columns_for(format, 2)), format)
    assert weight.scales is not None
    odd = torch.tensor([0.0, 1e-40, 3e38]).bfloat16()
    scales = scales_of(weight)
    scales[..., :9, 0] = odd.repeat(3)
    codes, mask = codes_of(weight), mask_of(weight)
    made = pack_codes(codes, format, scales, mask)
    validate(made)
    assert torch.equal(codes_of(made), codes) and torch.equal(mask_of(made), mask)
    assert torch.equal(scales_of(made), scales)
    same = pack_codes(codes, format, scales_of(weight), mask)
    assert all(torch.equal(own, weight.tensors()[name]) for name, own in same.tensors().items())


@pytest.mark.parametrize("read", [codes_of, scales_of])
def test_values_have_no_codes_and_scales(read: Callable[[PackedWeight], Tensor]) -> None:
    packed = pack(random_weight(16, 64), Format.parse("5:16-bf16"))
    with pytest.raises(LayoutError, match="5:16-bf16 has values, no codes"):
        read(packed)


def test_zero_and_tiny_weights() -> None:
    weight = torch.zeros(16, 64)
    weight[0, 0] = 1e-44
    for text in ("5:16-int4-g64", "dense-int8-g64", "dense-int4-g32"):
        packed = pack(weight, Format.parse(text))
        validate(packed)
        assert unpack(packed).abs().max() <= 1e-44


def test_dense_mask_zeroes_weights() -> None:
    weight, mask = random_weight(16, 32), random_weight(16, 32, seed=1) > 0
    packed = pack(weight, Format.parse("dense-int4-g32"), mask)
    assert unpack(packed)[~mask].count_nonzero() == 0
    assert mask_of(packed).all()


class LargestTemporary(TorchDispatchMode):
    """Notes the largest tensor that an operation makes, views of `known` apart."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.nbytes = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_temporaries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "BLOCK_WEIGHTS", 1 << 14)
    weight = random_weight(2048, 512)
    with LargestTemporary(weight) as largest:
        packed = pack(weight, Format.parse("5:16-int4-g128"))
    assert largest.nbytes <= packed.codes.nbytes < weight.nbytes / 6


@pytest.mark.parametrize("text", FORMATS)
def test_format_text(text: str) -> None:
    assert str(Format.parse(text)) == text
    assert hash(Format.parse(text)) == hash(Format.parse(text))


def test_bytes_of_the_claim() -> None:
    packed = pack(random_weight(128, 256), Format.parse("5:16-int4-g128"))
    assert packed.bits_per_weight == 2.5 + 16 / 128


@pytest.mark.parametrize(
    "text",
    [
        *("0:16-int4-g32", "17:16-int4-g32", "5:16-int3-g32", "5:16-int16-g64", "5:16-int4-g16"),
        *("dense-bf16", "5:16", "5:16-int4", "5:8-int4-g32", "dense-int4-g0", "", "int4"),
        *("5" * 5000 + ":16-bf16", "\u0665:16-bf16", "05:16-bf16", "16:16-int4-g64"),
        *("5:16-int04-g64", "dense-int8-g064"),
    ],
)
def test_no_such_format(text: str) -> None:
    with pytest.raises(LayoutError, match=r"choose|write|keep"):
        Format.parse(text)


def test_weights_that_cannot_be_packed() -> None:
    format, weight = Format.parse("5:16-int4-g64"), random_weight(16, 64)
    ones = torch.ones(16, 64, dtype=torch.bool)
    bad: list[tuple[str, Any]] = [
        ("floating", lambda: pack(weight[0], format)),
        ("floating", lambda: pack(ones, format)),
        ("multiple of 64", lambda: pack(random_weight(16, 96), format)),
        ("multiple of 16", lambda: pack(random_weight(16, 40), Format.parse("5:16-bf16"))),
        ("nothing to store", lambda: pack(weight[:0], format)),
        ("mask is", lambda: pack(weight, format, ones[:8])),
        ("mask is", lambda: pack(weight, format, ones.float())),
        ("more than 5", lambda: pack(weight, format, ones)),
        ("scales are", lambda: pack(weight, format, scales=torch.ones(2, 16))),
        ("no scales", lambda: pack(weight, Format.parse("5:16-bf16"), scales=torch.ones(1, 16))),
        ("finite", lambda: pack(weight, format, scales=-torch.ones(1, 16))),
        ("NaN", lambda: pack(torch.full((16, 64), torch.nan), format)),
    ]
    for message, call in bad:
        with pytest.raises(LayoutError, match=message) as caught:
            call()
        assert isinstance(caught.value, KernelError | ValueError)


def test_validate_names_the_field() -> None:
    packed = pack(random_weight(32, 64), Format.parse("5:16-int8-g64"))
    four = pack(random_weight(32, 64), Format.parse("5:16-int4-g64"))
    exact = pack(random_weight(32, 64), Format.parse("5:16-bf16"))
    nan, infinite = exact.codes.clone(), exact.codes.clone()
    nan[0, 3, 4, 31], infinite[0, 0, 0, 0] = torch.nan, -torch.inf
    assert packed.positions is not None and packed.scales is not None
    swapped = four.codes[:, :, [1, 0, 2, 3, 4]].contiguous()
    shifted = torch.zeros(packed.codes.numel() + 1, dtype=torch.int8)[1:].view_as(packed.codes)
    for values in (nan, infinite):
        with pytest.raises(LayoutError, match="codes: values must be finite"):
            validate(replace(exact, codes=values))
    bad = {
        "codes is torch.int16": replace(packed, codes=packed.codes.short()),
        "codes is": replace(packed, codes=packed.codes[:, 1:]),
        "codes is not": replace(packed, codes=shifted),
        "codes: positions": replace(four, codes=swapped),
        "positions is": replace(packed, positions=packed.positions[:, :, :2]),
        "positions: positions": replace(packed, positions=torch.zeros_like(packed.positions)),
        "scales is": replace(packed, scales=packed.scales.float()),
        "scales is on": replace(packed, scales=packed.scales.to("meta")),
        "scales must": replace(packed, scales=torch.full_like(packed.scales, torch.nan)),
        "5:16-int8-g64 has": replace(packed, positions=None),
        "multiple of 64": replace(packed, columns=80),
    }
    for message, broken in bad.items():
        with pytest.raises(LayoutError, match=message):
            validate(broken)
