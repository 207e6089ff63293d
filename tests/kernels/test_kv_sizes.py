"""Keys and values of any size are held to the same error, up to where float32 ends."""

from typing import Any

import pytest
import torch

from conclave.kernels.attention import reference, store
from conclave.kernels.attention.cache import NONE, KVFormat, NarrowCache, Overflow

from .test_kv_store import CPU, FORMATS, PAGE, PAGES, Written, errors_of, limit_of, named, rule_of

SIZES = [-100, -73, 60, 67]
"""Powers of two near 1e-30, 1e-22, 1e18 and 1e20, whose squares are no float32s."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_vectors_of_any_size_are_stored_alike(format: KVFormat, size: int) -> None:
    check_size(reference, format, size, CPU)


def check_size(module: Any, format: KVFormat, size: int, device: torch.device) -> None:
    """Vectors times a power of two get the digits and errors that they have without it."""
    rule, slots = rule_of(format, device), torch.randperm(PAGES * PAGE)[:16].to(device)
    plain = torch.randn(2, 16, format.kv_heads, format.head_dim).to(device)
    plain[:, ::4] **= 3
    plain[:, 1] = 0
    (key, value), scale = plain, 2.0**size
    limits = torch.full((16,), limit_of(format), device=device)
    limits[5] = 1e-9
    whole, scaled = (Written(module, format, 64, device) for _ in range(2))
    expected = whole.store(key, value, slots, limits, rule)
    failed = scaled.store(key * scale, value * scale, slots, limits, rule)
    assert failed.tolist() == expected.tolist() == [token == 5 for token in range(16)]
    assert 0 < len(scaled.held()) == len(whole.held())
    assert torch.equal(scaled.cache.second == NONE, whole.cache.second == NONE)
    assert torch.equal(scaled.cache.codes, whole.cache.codes)
    torch.testing.assert_close(scaled.cache.largest, whole.cache.largest)
    errors = errors_of(scaled, key * scale, value * scale, slots, rule).max(1).values
    assert torch.equal(errors > limits, failed)


def test_what_is_too_small_or_too_large_is_marked() -> None:
    check_edges(reference, CPU)


def check_edges(module: Any, device: torch.device) -> None:
    """Where float32 ends every token is within its limit or marked; zeros need nothing."""
    format = KVFormat(1, 64, 8)
    sizes = 2.0 ** torch.arange(-149, 128, 4, dtype=torch.float64)
    value = (torch.randn(len(sizes), 1, 64).double() * sizes[:, None, None]).float().to(device)
    value[::9] = 0
    slots = torch.arange(len(value), device=device)
    limits = torch.full((len(value),), 0.006, device=device)
    cache = NarrowCache.empty(format, len(value), 1, Overflow.empty(format, 128, device))
    failed = torch.zeros(len(value), dtype=torch.bool, device=device)
    module.store(value, value, cache, slots, limits, failed)
    read = reference.read(cache, slots[None])[1][0]
    lost, size = (own.double().norm(dim=-1)[:, 0] for own in (read.double() - value, value))
    assert ((lost <= 0.006 * size) | failed).all() and not failed[::9].any()
    common = (sizes > 1e-32) & (sizes < 1e35)
    assert failed.any() and not failed[common.to(device)].any()


@pytest.mark.kernel
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[4], FORMATS[6]], ids=named)
def test_kernels_store_vectors_of_any_size_alike(
    format: KVFormat, size: int, device: torch.device
) -> None:
    check_size(store, format, size, device)


@pytest.mark.kernel
def test_kernels_mark_what_is_too_small_or_too_large(device: torch.device) -> None:
    check_edges(store, device)
