"""Expanding against `unpack`: every format, edges of tiles, every element written once."""

from dataclasses import replace

import pytest
import torch

from conclave.kernels.errors import KernelInputError
from conclave.kernels.expand import expand
from conclave.kernels.formats import from_tensors, tensor_shapes
from conclave.kernels.layouts import Format, PackedWeight, pack, unpack

pytestmark = pytest.mark.kernel

FORMATS = [
    *("5:16-int4-g128", "6:16-int4-g64", "1:16-int4-g32", "15:16-int4-g64"),
    *("3:16-int8-g64", "8:16-int8-g32", "1:16-bf16", "5:16-bf16", "dense-int4-g32"),
    *("dense-int4-g128", "dense-int8-g64"),
]


def weight_of(text: str, device: torch.device, *shape: int) -> PackedWeight:
    return pack(torch.randn(shape), Format.parse(text)).to(device)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", [(48, 256), (2, 200, 128)], ids=str)
def test_expand(text: str, shape: tuple[int, ...], device: torch.device) -> None:
    weight = weight_of(text, device, *shape)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(expand(weight, dtype=dtype), unpack(weight, dtype)), dtype


@pytest.mark.parametrize("text", ["5:16-int4-g64", "8:16-int8-g64", "dense-int4-g64"])
def test_awkward_columns(text: str, device: torch.device) -> None:
    weight = weight_of(text, device, 16, 704)
    assert torch.equal(expand(weight, dtype=torch.float32), unpack(weight))


@pytest.mark.parametrize("text", FORMATS)
def test_bfloat16(text: str, device: torch.device) -> None:
    """Into memory of the caller, of which nothing else is touched."""
    weight = weight_of(text, device, 20, 128)
    memory = torch.full((22, 128), torch.nan, dtype=torch.bfloat16, device=device)
    assert expand(weight, memory[1:21]).data_ptr() == memory[1].data_ptr()
    assert memory[[0, 21]].isnan().all()
    if device.type == "cuda":
        assert torch.equal(memory[1:21], unpack(weight, torch.bfloat16))
    else:
        # The interpreter cuts where GPUs round.
        expected = unpack(weight)
        assert ((memory[1:21] - expected).abs() <= expected.abs() * 2**-7).all()


def test_expand_refuses_what_does_not_fit(device: torch.device) -> None:
    weight = weight_of("5:16-int4-g64", device, 16, 64)
    right = torch.zeros(16, 64, device=device)
    for out in (right[:8], right.double(), right.int(), torch.zeros(64, 16, device=device).T):
        with pytest.raises(KernelInputError, match="out is"):
            expand(weight, out)
    with pytest.raises(KernelInputError, match="out is"):
        expand(replace(weight, rows=12), right)


def test_more_experts_than_a_grid_has_room_for_are_refused(device: torch.device) -> None:
    format = Format.parse("1:16-int4-g32")
    shapes = tensor_shapes(format, 1, 32, 65_536)
    tensors = {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in shapes.items()
    }
    with pytest.raises(KernelInputError, match="grid of 1 x 1 x 65536 blocks"):
        expand(from_tensors(format, 1, 32, tensors))
