"""Heads normed, weighted and turned in one kernel; and a gate that lets through."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conclave.kernels.gate import let_through
from conclave.kernels.heads import norm_heads

from .conftest import INTERPRETED

pytestmark = pytest.mark.kernel
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
MOST_ERROR = 1e-3 if INTERPRETED else 3e-3


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def turned(heads: Tensor, weight: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = (each.double() for each in rotation)
    weighted = heads * weight.double()
    return weighted * cosine + weighted.roll(heads.shape[-1] // 2, -1) * sine


@pytest.mark.parametrize("dim", [64, 256, 512])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "stored"), [(1, 1, 3), (8, 2, 12), (5, 3, 8), (3, 0, 3), (32, 4, 36)]
)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_heads(
    tokens: int, heads: int, kv_heads: int, stored: int, dim: int, device: torch.device
) -> None:
    """Values of their own, values that are the raw keys, and no keys at all."""
    torch.manual_seed(0)
    projected = torch.randn(tokens, stored, dim, device=device).to(DTYPE)
    weights = (torch.rand(2 if kv_heads else 1, dim, device=device) + 0.5).to(DTYPE)
    tables = torch.randn(2, tokens, 1, 3 * dim, device=device)
    rotation = tables[0, ..., dim : 2 * dim], tables[1, ..., dim : 2 * dim]
    query, key, value = norm_heads(projected, weights, rotation, heads, kv_heads, 1e-6)
    exact = projected.double()
    normed = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert relative(query, turned(normed[:, :heads], weights[0], rotation)) <= MOST_ERROR
    assert key.shape == value.shape == (tokens, kv_heads, dim)
    if kv_heads:
        own = normed[:, heads : heads + kv_heads]
        assert relative(key, turned(own, weights[1], rotation)) <= MOST_ERROR
        assert relative(value, normed[:, -kv_heads:]) <= MOST_ERROR


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 1000), (5, 1032)])
def test_gate(rows: int, width: int, device: torch.device) -> None:
    """Into rows that lie apart, and nothing beside them."""
    torch.manual_seed(0)
    pairs = torch.randn(rows, 2 * width, device=device).to(DTYPE)
    memory = torch.full((rows, width + 16), torch.nan, device=device, dtype=DTYPE)
    let_through(pairs, memory[:, :width], 0.5)
    exact = pairs.double()
    wanted = F.gelu(exact[:, ::2], approximate="tanh") * exact[:, 1::2] * 0.5
    assert relative(memory[:, :width], wanted) <= MOST_ERROR
    assert memory[:, width:].isnan().all()
