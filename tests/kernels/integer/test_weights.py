"""Scales that are whole numbers of a unit: what they are, and weights as integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conclave.kernels.errors import KernelInputError, LayoutError
from conclave.kernels.expand import expand_integers
from conclave.kernels.integer.weights import (
    MOST,
    Ruler,
    is_whole,
    pack_whole,
    row_units,
    whole_scales,
)
from conclave.kernels.layouts import Format, pack, unpack, validate

FORMATS = ["5:16-int4-g128", "8:16-int4-g64", "1:16-int4-g32", "dense-int4-g32"]


SCALES = st.just(0.0) | st.floats(2.0**-90, 2.0**90, width=32)


@given(st.lists(SCALES, min_size=1, max_size=20))
def test_whole_scales(given: list[float]) -> None:
    """1 to 15 units each, the largest 15; near what they were; and they stay what they are."""
    scales = torch.tensor(given).bfloat16()[:, None]
    whole = whole_scales(scales)
    unit = Ruler.of(whole).units
    if float(unit) == 0:
        assert not whole.any()
        return
    multiples = whole.double() / unit
    assert torch.equal(multiples, multiples.round())
    assert int(multiples.min()) >= 1 and int(multiples.max()) == MOST
    assert torch.equal(whole_scales(whole), whole)
    largest = scales.double().max()
    assert abs(float(whole.double().max() / largest) - 1) <= 1 / 16 + 1e-6
    off = (whole.double() - scales.double()).abs()
    small = scales.double() < unit / 2
    assert bool((off <= unit * 0.51 + largest * 0.063)[~small].all())


@pytest.mark.parametrize("experts", [(), (2,)])
@pytest.mark.parametrize("format", FORMATS)
def test_packing(format: str, experts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(*experts, 72, 256)
    weight[..., 3, :] = 0.0
    found, usual = pack_whole(weight, Format.parse(format)), pack(weight, Format.parse(format))
    validate(found)
    assert is_whole(found) and not is_whole(usual)
    assert torch.equal(found.codes & 15, usual.codes & 15) or "dense" in format, "the same survive"
    off, least = (float((unpack(own) - weight).norm()) for own in (found, usual))
    assert off < 1.05 * least


def test_other_formats_are_never_whole() -> None:
    for format in ("5:16-int8-g64", "dense-int8-g64", "4:16-bf16"):
        assert not is_whole(pack(torch.zeros(16, 64), Format.parse(format)))


@pytest.mark.kernel
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (200, 384), (131, 640)])
def test_integers(format: str, rows: int, columns: int, device: torch.device) -> None:
    """Integer times unit is the weight, to the last bit of a float32 product."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    weight[5] = 0.0
    packed = pack_whole(weight, Format.parse(format)).to(device)
    units = row_units(packed)
    integers = torch.full((rows, columns), 77, dtype=torch.int8, device=device)
    expand_integers(packed, units, integers)
    assert int(integers.min()) >= -8 * MOST and int(integers.max()) <= 7 * MOST
    torch.testing.assert_close(
        integers.float() * units[:rows, None], unpack(packed), rtol=1e-6, atol=0
    )


@pytest.mark.kernel
def test_refused(device: torch.device) -> None:
    packed = pack_whole(torch.randn(16, 128), Format.parse("5:16-int4-g128")).to(device)
    units = row_units(packed)
    for out in (
        torch.empty(16, 128, dtype=torch.int16, device=device),
        torch.empty(16, 64, dtype=torch.int8, device=device),
        torch.empty(128, 16, dtype=torch.int8, device=device).t(),
    ):
        with pytest.raises(KernelInputError, match="contiguous int8"):
            expand_integers(packed, units, out)
    out = torch.empty(16, 128, dtype=torch.int8, device=device)
    with pytest.raises(KernelInputError, match="a unit for each row"):
        expand_integers(packed, units[:8], out)
    with pytest.raises(LayoutError, match="no units"):
        row_units(pack(torch.randn(16, 128), Format.parse("5:16-bf16")))
