"""Attention of a chunk against float64: any length, offset and window, groups of heads."""

import pytest
import torch
from torch import Tensor

from conclave.kernels.attention.prefill import prefill
from conclave.kernels.errors import KernelInputError

pytestmark = pytest.mark.kernel


def truth(query: Tensor, key: Tensor, value: Tensor, offset: int, window: int | None) -> Tensor:
    """In float64, by the rule's own words."""
    group = query.shape[1] // key.shape[0]
    keys, values = (each.double().repeat_interleave(group, 0) for each in (key, value))
    scores = torch.einsum("lhd,hsd->hls", query.double(), keys)
    own = torch.arange(len(query), device=query.device)[:, None] + offset
    other = torch.arange(key.shape[1], device=query.device)[None, :]
    seen = (other <= own) & (other > own - (window or 1 << 30))
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hls,hsd->lhd", scores.softmax(-1), values)


def most_error(dtype: torch.dtype) -> float:
    """Probabilities and outputs are rounded to the dtype."""
    return 4e-3 if dtype == torch.bfloat16 else 5e-4


def check(
    dtype: torch.dtype,
    queries: int,
    keys: int,
    heads: tuple[int, int],
    dim: int,
    offset: int,
    window: int | None,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    query = (torch.randn(queries, heads[0], dim, device=device) / dim**0.5 * 2).to(dtype)
    key, value = torch.randn(2, heads[1], keys, dim, device=device).to(dtype)
    wanted = truth(query, key, value, offset, window)
    # What nobody sees may be anything but is never multiplied.
    key[:, offset + queries :] = torch.nan
    value[:, offset + queries :] = torch.nan
    memory = torch.full((queries + 2, heads[0], dim), torch.nan, dtype=dtype, device=device)
    prefill(query, key, value, offset, window, memory[1:-1])
    assert memory[[0, -1]].isnan().all()
    assert float((memory[1:-1].double() - wanted).norm() / wanted.norm()) <= most_error(dtype)


def dtypes(device: torch.device) -> list[torch.dtype]:
    """The interpreter cannot multiply matrices of bfloat16."""
    return [torch.float16] if device.type == "cpu" else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("window", [None, 1, 7, 33, 1000])
@pytest.mark.parametrize(("queries", "keys", "offset"), [(40, 40, 0), (17, 90, 60), (1, 5, 4)])
def test_lengths_and_windows(
    window: int | None, queries: int, keys: int, offset: int, device: torch.device
) -> None:
    for dtype in dtypes(device):
        check(dtype, queries, keys, (2, 1), 64, offset, window, device)


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("dim", [24, 128])
def test_heads(heads: tuple[int, int], dim: int, device: torch.device) -> None:
    for dtype in dtypes(device):
        check(dtype, 33, 70, heads, dim, 30, None, device)


def test_wide_heads(device: torch.device) -> None:
    for dtype in dtypes(device):
        check(dtype, 20, 60, (2, 1), 512, 40, 24, device)
        check(dtype, 20, 60, (2, 1), 256, 40, None, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="long")
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
@pytest.mark.parametrize("window", [None, 1024])
def test_long(dim: int, window: int | None, device: torch.device) -> None:
    check(torch.bfloat16, 777, 3001, (8, 2), dim, 2000, window, device)
    check(torch.float16, 2048, 2048, (8, 2), dim, 0, window, device)


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    query = torch.zeros(4, 4, 32, dtype=torch.float16, device=device)
    key = torch.zeros(2, 8, 32, dtype=torch.float16, device=device)
    out = torch.zeros_like(query)
    for wrong in (
        (query.float(), key, key, 0, None, out),
        (query[0], key, key, 0, None, out),
        (query, key[..., :16], key, 0, None, out),
        (query[:, :3].contiguous(), key, key, 0, None, out),
        (query, key, key[:1], 0, None, out),
        (query, key, key, 0, None, out[:1]),
        (query, key, key, 5, None, out),
        (query, key, key, 0, 0, out),
        (query, key.bfloat16(), key, 0, None, out),
        (query, key.transpose(1, 2).contiguous().transpose(1, 2), key, 0, None, out),
    ):
        with pytest.raises(KernelInputError, match="prefill attention"):
            prefill(*wrong)
