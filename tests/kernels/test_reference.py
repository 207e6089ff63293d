"""The reference ops against a loop over queries that a reader can check by eye."""

import pytest
import torch

from conclave.kernels.reference import paged_attention, plan_pages, write_kv

BLOCK = 4


def visible(position: int, window: int | None) -> range:
    return range(0 if window is None else max(0, position - window + 1), position + 1)


@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (5, 1), (3, 3)])
@pytest.mark.parametrize(("queries", "starts"), [(1, [0, 6, 13]), (5, [4]), (9, [0])], ids=str)
def test_paged_attention(
    window: int | None, heads: int, kv_heads: int, queries: int, starts: list[int]
) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 20, BLOCK, kv_heads, 8)
    tables = torch.randperm(20)[: 4 * len(starts)].view(len(starts), 4)
    query = torch.randn(len(starts), queries, heads, 8)
    pages = plan_pages(
        tables,
        torch.tensor(starts),
        window,
        queries=queries,
        block_size=BLOCK,
        dtype=torch.float32,
    )
    output = paged_attention(query, keys, values, pages)
    for row, start in enumerate(starts):
        own_keys, own_values = keys[tables[row]].flatten(0, 1), values[tables[row]].flatten(0, 1)
        for index in range(queries):
            seen = list(visible(start + index, window))
            for head in range(heads):
                shared = head * kv_heads // heads
                weights = (own_keys[seen, shared] @ query[row, index, head]).softmax(0)
                expected = weights @ own_values[seen, shared]
                assert torch.allclose(output[row, index, head], expected, atol=1e-5)


def test_write_kv_touches_its_slots_only() -> None:
    key, value = torch.randn(2, 3, 2, 8)
    key_cache, value_cache = torch.zeros(5, BLOCK, 2, 8), torch.zeros(5, BLOCK, 2, 8)
    slots = torch.tensor([17, 2, 9])
    write_kv(key, value, key_cache, value_cache, slots)
    for given, cache in ((key, key_cache), (value, value_cache)):
        assert torch.equal(cache.flatten(0, 1)[slots], given)
        assert cache.count_nonzero() == given.numel()
