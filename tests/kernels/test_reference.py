"""The reference ops against loops and float64 that a reader can check by eye."""

from collections.abc import Callable

import pytest
import torch

from conclave.kernels.errors import KernelInputError
from conclave.kernels.formats import from_tensors
from conclave.kernels.layouts import Format, pack, unpack
from conclave.kernels.reference import (
    gated_linear,
    grouped_linear,
    linear,
    paged_attention,
    plan_pages,
    write_kv,
)

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


@pytest.mark.parametrize("slots", [[-1, 2, 9], [17, 2, -21], [-1, -(2**40), -3]], ids=str)
def test_write_kv_stores_nothing_without_a_slot(slots: list[int]) -> None:
    key, value = torch.randn(2, 3, 2, 8)
    key_cache, value_cache = torch.full((2, 5, BLOCK, 2, 8), torch.nan)
    write_kv(key, value, key_cache, value_cache, torch.tensor(slots))
    for given, cache in ((key, key_cache), (value, value_cache)):
        rest = cache.flatten(0, 1)
        for row, slot in enumerate(slots):
            if slot >= 0:
                assert torch.equal(rest[slot], given[row])
                rest[slot] = torch.nan
        assert cache.isnan().all()


@pytest.mark.filterwarnings("ignore")  # of TorchScript's age, and that it does not look
def test_a_recorded_write_kv_does_not_look_at_slots() -> None:
    """It costs as much as if there were no rule, and refuses what would need it."""
    key, value = torch.randn(2, 3, 2, 8)
    caches = torch.zeros(5, BLOCK, 2, 8), torch.zeros(5, BLOCK, 2, 8)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        write_kv(*inputs)
        return inputs[0]

    slots = torch.tensor([17, 2, 9])
    recording = torch.jit.trace(run, (key, value, *caches, slots), check_trace=False)
    calls = {node.kind() for node in recording.graph.nodes()} - {"prim::Constant"}
    assert calls == {"aten::flatten", "aten::index_copy_"}
    with pytest.raises(RuntimeError, match="out of bounds"):
        recording(key, value, *caches, torch.tensor([1, -1, 2]))


FORMATS = ["5:16-int4-g64", "8:16-int8-g32", "6:16-bf16", "dense-int4-g32", "dense-int8-g64"]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = pack(torch.randn(200, 64), Format.parse(text))
    dense = unpack(packed, torch.float64)
    x, residual = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 200).to(dtype)
    plain = x.double() @ dense.T
    for output, expected in (
        (linear(x, packed), plain),
        (linear(x, packed, residual), plain + residual),
        (linear(x, packed, scale=0.5), plain * 0.5),
        (linear(x, packed, residual, 3.0), (plain + residual) * 3),
        (
            gated_linear(x, packed),
            torch.nn.functional.gelu(plain[..., ::2], approximate="tanh") * plain[..., 1::2],
        ),
    ):
        assert output.dtype == dtype and output.shape == expected.shape
        error = (output.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("text", FORMATS)
def test_grouped_linear(text: str) -> None:
    torch.manual_seed(0)
    packed = pack(torch.randn(4, 20, 64), Format.parse(text))
    x, experts = torch.randn(6, 64), torch.tensor([0, 1, 1, 3, 3, 3], dtype=torch.int32)
    output = grouped_linear(x, packed, experts)
    for token, expert in enumerate(experts.tolist()):
        assert torch.allclose(output[token], linear(x[token], packed.expert(expert)), atol=1e-5)
    slots = torch.tensor(
        [5, 2, 2, 0, 0, 0], dtype=torch.int32
    )  # in another order, in a larger stack
    places = torch.tensor([3, 2, 1, 2, 2, 0])
    larger = {name: tensor[places] for name, tensor in packed.tensors().items()}
    moved = from_tensors(packed.format, packed.rows, packed.columns, larger)
    assert torch.equal(grouped_linear(x, moved, slots), output)
    one = grouped_linear(x[:1].expand(2, -1), packed, experts[:2])
    assert torch.allclose(one[1], linear(x[0], packed.expert(1)), atol=1e-5)
    both = grouped_linear(x, packed, experts, gated=True)
    for token, expert in enumerate(experts.tolist()):
        expected = gated_linear(x[token], packed.expert(expert))
        assert torch.allclose(both[token], expected, atol=1e-5)


def test_linears_refuse_what_does_not_fit() -> None:
    single = pack(torch.randn(3, 64), Format.parse("5:16-bf16"))
    stack = pack(torch.randn(2, 3, 64), Format.parse("5:16-bf16"))
    x, experts = torch.randn(2, 64), torch.zeros(2, dtype=torch.int32)
    apart = torch.tensor([1, 0, 1], dtype=torch.int32)
    bad: list[tuple[str, Callable[[], torch.Tensor]]] = [
        ("3 x 64", lambda: linear(x[:, :48], single)),
        ("stack of 2", lambda: linear(x, stack)),
        ("residual", lambda: linear(x, single, x)),
        ("pairs", lambda: gated_linear(x, single)),
        ("side by side", lambda: grouped_linear(torch.randn(3, 64), stack, apart)),
        ("single", lambda: grouped_linear(x, single, experts)),
        ("int32", lambda: grouped_linear(x, stack, experts.long())),
        ("int32", lambda: grouped_linear(x, stack, experts[:1])),
        ("0 to 2 of 2", lambda: grouped_linear(x, stack, torch.tensor([0, 2]).int())),
        ("-1 to 0 of 2", lambda: grouped_linear(x, stack, torch.tensor([-1, 0]).int())),
    ]
    for message, call in bad:
        with pytest.raises(KernelInputError, match=message):
            call()
