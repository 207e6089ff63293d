"""A weight that is trained is the weight that is stored, to the last bit."""

import pytest
import torch

from conclave.kernels.formats import Format
from conclave.kernels.integer.weights import is_whole, pack_whole
from conclave.kernels.layouts import mask_of, pack, unpack
from conclave.worker.compress.recovery.trained import Stored
from conclave.worker.model.packed import packed_order, plain_order

FORMATS = ["5:16-int4-g64", "8:16-int8-g32", "4:16-bf16", "dense-int4-g64", "dense-int8-g32"]
NAMES = ["layers.0.attention.out.weight", "layers.0.feed_forward.mlp.gate_up.weight"]


@pytest.mark.parametrize(
    ("format", "whole"), [*((each, False) for each in FORMATS), ("5:16-int4-g64", True)]
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("experts", [(), (3,)])
def test_it_starts_and_ends_as_stored(
    format: str, whole: bool, name: str, experts: tuple[int, ...]
) -> None:
    """And scales that are whole stay it."""
    torch.manual_seed(1)
    weight = torch.randn(*experts, 140, 128)
    weight[..., 3, :] = 0.0  # a row without scales
    store = pack_whole if whole else pack
    packed = store(packed_order(name, weight), Format.parse(format))
    own = Stored(name, packed, weight)
    values = plain_order(name, unpack(packed)).requires_grad_(True)
    assert torch.equal(own(values), values), "as it was read"

    optimizer = torch.optim.AdamW([values, *own.parameters()], lr=0.02)
    for _ in range(5):
        ((own(values) - weight.roll(1, -1)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    again = own.repacked(values)
    assert not torch.equal(unpack(again), unpack(packed))
    assert torch.equal(plain_order(name, unpack(again)), own(values).detach())
    assert torch.equal(mask_of(again), mask_of(packed)), "the map stays"
    assert is_whole(again) == whole


def test_gradients_pass_rounding_but_not_the_limits_or_the_map() -> None:
    weight = torch.full((1, 64), 0.1)
    weight[0, ::16] = 1.0
    name = NAMES[0]
    packed = pack(weight, Format.parse("1:16-int4-g64"), scales=torch.full((1, 1), 0.25))
    own = Stored(name, packed, weight)
    values = weight.clone()
    values[0, 0] = 9.0  # far beyond 7 * 0.25
    values.requires_grad_(True)
    own(values).sum().backward()
    expected = torch.zeros(1, 64)
    expected[0, 16::16] = 1.0
    assert values.grad is not None and torch.equal(values.grad, expected)
    assert own.growth is not None and own.growth.grad is not None
    assert own.growth.grad.item() == pytest.approx(7 * 0.25, abs=1e-6), "clipped: all of it"


def test_survivors_first_then_the_largest() -> None:
    weight = torch.arange(32.0).view(2, 16) + 1
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :4] = True
    packed = pack(weight, Format.parse("4:16-bf16"), mask=mask)
    own = Stored(NAMES[0], packed, weight)
    own.kept.fill_(6)
    expected = mask.clone()
    expected[:, 14:] = True
    assert torch.equal(own(weight) != 0, expected)
    own.kept.fill_(16)
    assert torch.equal(own(weight), weight.bfloat16().float())


def test_a_pattern_that_no_format_knows() -> None:
    weight = torch.randn(6, 64)
    mask = torch.rand(6, 64) < 0.3
    packed = pack(weight * mask, Format.parse("dense-int4-g64"))
    own = Stored(NAMES[0], packed, weight, mask)
    assert not own(weight)[~mask].any() and own(weight)[mask].count_nonzero() > mask.sum() * 0.8
    assert torch.equal(unpack(own.repacked(weight)), own(weight).detach())


def test_a_map_is_learned_by_what_is_wanted() -> None:
    """Pruned weights have the gradient of those that are not; scales have none of theirs."""
    weight = torch.full((1, 64), 0.5)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[:, ::16] = True
    packed = pack(weight, Format.parse("1:16-int4-g64"), mask=mask)
    own = Stored(NAMES[0], packed, weight, remapped=True)
    values = unpack(packed).clone().requires_grad_(True)
    wanted = torch.zeros(1, 64)
    wanted[:, 3::16] = 0.5
    optimizer = torch.optim.SGD([values, *own.parameters()], lr=0.2)
    for step in range(40):
        ((own(values) - wanted) ** 2).sum().backward()
        if step == 0:
            assert values.grad is not None and (values.grad[~mask] == -2 * wanted[~mask]).all()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            own.remap(values)
    assert torch.equal(mask_of(own.repacked(values)), wanted > 0)
    assert torch.allclose(own(values), wanted, atol=0.1)
    own.learns.fill_(False)
    own(values).sum().backward()
    assert values.grad is not None and not values.grad[wanted == 0].any()
    assert torch.equal(unpack(own.repacked(values)), own(values).detach())
