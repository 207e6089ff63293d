"""Plain caches written: every shape and dtype, nothing beside the slots, nothing without one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conclave.kernels.attention import write
from conclave.kernels.attention.cache import DTYPES
from conclave.kernels.errors import KernelInputError
from conclave.kernels.reference import write_kv

SHAPES = [
    (1, 16, 256, 16),
    (1, 1, 8, 1),
    (3, 4, 512, 3),
    (3, 2, 1024, 16),
    (17, 3, 96, 3),
    (17, 2, 64, 16),
    (17, 1, 3, 16),
    (17, 2, 2, 1),
    (300, 1, 128, 16),
]
"""Tokens, kv_heads, head_dim and places of a page."""
MISSING = {"none": 0.0, "some": 0.4, "all": 1.0}
"""Shares of tokens without a slot."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def drawn_slots(tokens: int, places: int, missing: float, device: torch.device) -> Tensor:
    """Some of the places; -1 and whatever else is negative where there is none."""
    slots = torch.randperm(places)[:tokens]
    without = torch.randperm(tokens)[: round(missing * tokens)]
    slots[without] = -1 - torch.arange(len(without)) * 2**33
    return slots.to(device)


def emptied(pages: int, page: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """Caches full of NaN."""
    shape = (pages, page, *key.shape[1:])
    keys, values = (torch.full(shape, torch.nan, dtype=key.dtype, device=key.device) for _ in "kv")
    return keys, values


def check(key: Tensor, value: Tensor, slots: Tensor, page: int) -> None:
    """Ours and the reference's caches are the same, in places that nobody wrote as well."""
    pages = len(slots) // page + 2
    ours, true = (emptied(pages, page, key) for _ in range(2))
    write.write(key, value, *ours, slots)
    write_kv(key, value, *true, slots)
    for own, same in zip(ours, true, strict=True):
        torch.testing.assert_close(own, same, rtol=0, atol=0, equal_nan=True)
    assert int((~ours[0].isnan()).sum()) == int((slots >= 0).sum()) * key[0].numel()


@pytest.mark.kernel
@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_write_equals_its_reference(
    shape: tuple[int, int, int, int], missing: float, device: torch.device
) -> None:
    tokens, heads, head_dim, page = shape
    key, value = torch.randn(2, tokens, heads, head_dim, device=device).bfloat16()
    check(key, value, drawn_slots(tokens, tokens + page, missing, device), page)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_takes_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    key, value = torch.randn(2, 5, 3, 96, device=device).to(dtype)
    check(key, value, drawn_slots(5, 8, 0.4, device), 4)


@pytest.mark.kernel
@pytest.mark.parametrize("missing", [0, 4], ids=["first", "last"])
def test_one_token_alone_is_left_out(missing: int, device: torch.device) -> None:
    key, value = torch.randn(2, 5, 2, 64, device=device).bfloat16()
    slots = drawn_slots(5, 8, 0.0, device)
    slots[missing] = -1
    check(key, value, slots, 4)


@pytest.mark.kernel
def test_write_takes_tokens_that_lie_apart(device: torch.device) -> None:
    """Parts of one projection, heads before tokens, and what begins between aligned addresses."""
    projected = torch.randn(6, 10, 64, device=device).bfloat16()
    odd = torch.randn(6, 2 * 64 + 3, device=device).bfloat16()[:, 3:].unflatten(1, (2, 64))
    inputs = [
        (projected[:, 6:8], projected[:, 8:]),
        (projected[:, 1:3], projected[0, :6, :].expand(2, -1, -1).transpose(0, 1)),
        (odd, projected[:, :2]),
        (odd[:1], projected[:1, :2]),
        (projected[:, :4, ::2], projected[:, 4:8, 1::2]),
        (projected[:, :1], projected[:, 9:]),
    ]
    for key, value in inputs:
        check(key, value, drawn_slots(len(key), 8, 0.3, device), 4)
    rows = torch.stack([drawn_slots(3, 8, 0.3, device) for _ in range(2)])
    check(projected[:3, :2], projected[3:, :2], rows[1], 4)


@pytest.mark.kernel
def test_no_tokens_are_written_nowhere(device: torch.device) -> None:
    key = torch.empty(0, 2, 64, device=device)
    caches = emptied(3, 4, key)
    write.write(key, key, *caches, torch.empty(0, dtype=torch.int64, device=device))
    assert all(own.isnan().all() for own in caches)


def test_write_refuses_what_does_not_fit() -> None:
    x, slots = torch.zeros(2, 3, 24), torch.tensor([5, -1])
    keys, values = emptied(3, 4, x)
    good: dict[str, Any] = {"key": x, "value": x, "keys": keys, "values": values, "slots": slots}
    wrong: list[dict[str, Any]] = [
        {"key": x.half()},
        {"value": x.double()},
        {"key": x[:1]},
        {"value": x[:, :2]},
        {"value": x[..., :12]},
        {"key": x[0]},
        {"key": x.to("meta")},
        {"keys": keys[0]},
        {"keys": keys.double(), "values": values.double(), "key": x.double(), "value": x.double()},
        {"keys": keys[:2]},
        {"values": values.half()},
        {"values": values[..., :12]},
        {"keys": keys.transpose(0, 1), "values": values.transpose(0, 1)},
        {"slots": slots.int()},
        {"slots": slots[:1]},
        {"slots": slots[None]},
        {"slots": slots.to("meta")},
        {"slots": torch.arange(4)[::2]},
    ]
    for change in wrong:
        with pytest.raises(KernelInputError, match="writing keys and values: "):
            write.write(**good | change)
    assert keys.isnan().all() and values.isnan().all()
