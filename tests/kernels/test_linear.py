"""The op that models call: shapes, fake tensors, refusals; on a card all its paths and graphs."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from conclave.kernels import linear as module
from conclave.kernels import reference
from conclave.kernels import scratch as scratch_module
from conclave.kernels.errors import KernelInputError
from conclave.kernels.formats import from_tensors
from conclave.kernels.layouts import Format, PackedWeight, pack, unpack
from conclave.kernels.linear import gated_linear, grouped_linear, linear

DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")


def weight_of(text: str, *shape: int) -> PackedWeight:
    return pack(torch.randn(shape), Format.parse(text)).to(DEVICES[0])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 0, 64), (2, 5, 64)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    weight = weight_of("5:16-int4-g64", 80, 64)
    x = torch.randn(shape, device=DEVICES[0])
    residual = torch.randn(*shape[:-1], 80, device=DEVICES[0])
    got, expected = linear(x, weight, residual, 0.5), reference.linear(x, weight, residual, 0.5)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)


def test_experts() -> None:
    weight = weight_of("5:16-int4-g64", 4, 80, 64)
    x = torch.randn(6, 64, device=DEVICES[0])
    experts = torch.tensor([0, 1, 1, 2, 3, 3], dtype=torch.int32, device=DEVICES[0])
    expected = torch.einsum("tk,trk->tr", x, unpack(weight)[experts.long()])
    torch.testing.assert_close(grouped_linear(x, weight, experts), expected, rtol=1e-4, atol=1e-4)


def test_fake_tensors_and_the_compiler() -> None:
    weight = weight_of("5:16-int4-g64", 80, 64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.randn(2, 3, 64, device=DEVICES[0]))
        assert linear(fake, weight).shape == (2, 3, 80)
    x = torch.randn(3, 64, device=DEVICES[0])
    compiled = torch.compile(lambda x: linear(x, weight) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x, weight) + 1)


def test_what_does_not_fit_is_refused() -> None:
    weight, stack = weight_of("5:16-int4-g64", 80, 64), weight_of("5:16-int4-g64", 2, 80, 64)
    x, experts = torch.zeros(2, 64, device=DEVICES[0]), torch.zeros(2, dtype=torch.int32)
    wrong: dict[str, Callable[[], object]] = {
        "64 columns": lambda: linear(x[:, :32], weight),
        "no pairs": lambda: gated_linear(x, weight_of("5:16-int4-g64", 79, 64)),
        "residual is": lambda: linear(x, weight, x),
        "the weight on": lambda: linear(x.to("meta"), weight),
        "takes a stack": lambda: grouped_linear(x, weight, experts),
        "experts torch": lambda: grouped_linear(x, stack, experts.long()),
        "experts is on": lambda: grouped_linear(x, stack, experts.to("meta")),
        r"x is \(\)": lambda: linear(x[0, 0], weight),
        "x is torch.int64": lambda: linear(x.long(), weight),
        "x is torch.bool": lambda: gated_linear(x.bool(), weight),
        "x is torch.complex64": lambda: grouped_linear(x + 0j, stack, experts),
        "residual is torch.int32": lambda: linear(x, weight, torch.zeros_like(x[:, :1]).int()),
        "among is 3": lambda: grouped_linear(x, stack, experts.to(x.device), among=3),
    }
    for message, call in wrong.items():
        with pytest.raises(KernelInputError, match=message):
            call()


@on_card
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 16, 17, 33, 64, 65, 129, 193, 255, 300])
@pytest.mark.parametrize(
    ("text", "rows", "columns"),
    [
        ("5:16-int4-g128", 384, 1024),
        ("5:16-int4-g64", 200, 704),
        ("8:16-int4-g64", 1408, 2112),
        ("4:16-int4-g128", 80, 128),
        ("5:16-int8-g64", 200, 704),
        ("5:16-bf16", 200, 704),
        ("dense-int4-g32", 200, 704),
        ("dense-int4-g64", 200, 2112),
        ("dense-int4-g128", 384, 1024),
        ("dense-int8-g64", 200, 704),
        ("dense-int8-g128", 1408, 256),
    ],
)
def test_every_number_of_tokens(text: str, rows: int, columns: int, tokens: int) -> None:
    """Against float64, memory poisoned before; wide products round their scales too."""
    weight = weight_of(text, rows, columns)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
    exact = x.double() @ unpack(weight).double().T
    for added, expected in ((None, exact), (residual, exact + residual)):
        torch.full((1 << 22,), torch.nan, device="cuda")
        assert relative_error(linear(x, weight, added), expected) <= 3e-3
    gate = torch.nn.functional.gelu(exact[:, ::2], approximate="tanh")
    torch.full((1 << 22,), torch.nan, device="cuda")
    assert relative_error(gated_linear(x, weight), gate * exact[:, 1::2]) <= 5e-3


def through(pairs: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """As `gate.let_through`."""
    gate, up = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    out.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up * scale)


def test_written_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head is never dense as a whole."""
    if DEVICES == ["cpu"]:
        monkeypatch.setattr(module, "expand", lambda weight, out: unpack(weight, out=out))
        monkeypatch.setattr(module, "let_through", through)
        monkeypatch.setattr(
            module, "scratch", lambda own, dtype: torch.empty(own.rows, own.columns, dtype=dtype)
        )
    weight = weight_of("dense-int8-g64", 1000, 704)
    x, residual = torch.randn(300, 704), torch.randn(300, 1000)
    exact = x.double() @ unpack(weight.to("cpu")).double().T
    gate = torch.nn.functional.gelu(exact[:, ::2], approximate="tanh")
    monkeypatch.setattr(module, "MOST_EXPANDED", 300 * 704)
    assert [part.rows for _, part in module._parts(weight)] == [256, 256, 256, 232]
    for added, gated, expected in (
        (None, False, exact / 2),
        (residual, False, (exact + residual) / 2),
        (None, True, gate * exact[:, 1::2]),
    ):
        out = torch.empty(expected.shape, device=DEVICES[0])
        own = None if added is None else added.to(DEVICES[0])
        module._multiply(x.to(DEVICES[0]), weight, out, own, 0.5, gated)
        assert relative_error(out.cpu(), expected) < 2e-3


@on_card
@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 256])
def test_a_head(tokens: int) -> None:
    """The largest of all: 262,144 words."""
    table = torch.randn(4096, 5376, device="cuda").repeat(64, 1)
    weight = pack(table, Format.parse("dense-int8-g64"))
    x = torch.randn(tokens, 5376, device="cuda", dtype=torch.bfloat16)
    exact = x.double() @ unpack(weight)[:4096].double().T
    for part in linear(x, weight).unflatten(1, (64, 4096)).unbind(1):
        assert relative_error(part, exact) <= 3e-3


@on_card
@pytest.mark.parametrize("tokens", [1, 6, 7, 17, 100, 255, 1000, 5000])
@pytest.mark.parametrize(
    "text", ["5:16-int4-g64", "5:16-int4-g128", "dense-int4-g64", "dense-int8-g64"]
)
@pytest.mark.parametrize("gated", [False, True])
def test_tokens_sorted_by_expert(text: str, tokens: int, gated: bool) -> None:
    """Few and many tokens, experts that nobody or nearly all have chosen."""
    weight = weight_of(text, 6, 200, 1408)
    x = torch.randn(tokens, 1408, device="cuda", dtype=torch.bfloat16)
    experts = torch.tensor([0, 1, 1, 1, 1, 1, 1, 3, 5], dtype=torch.int32, device="cuda")
    experts = experts[torch.randint(9, (tokens,), device="cuda")].sort().values.to(torch.int32)
    wanted = torch.empty(tokens, 200, device="cuda", dtype=torch.float64)
    for expert in range(6):
        own = experts == expert
        wanted[own] = x[own].double() @ unpack(weight.expert(expert)).double().T
    if gated:
        gate = torch.nn.functional.gelu(wanted[:, ::2], approximate="tanh")
        wanted = gate * wanted[:, 1::2]
    torch.full((1 << 22,), torch.nan, device="cuda")
    most = 5e-3 if gated else 3e-3
    assert relative_error(grouped_linear(x, weight, experts, gated), wanted) <= most


def test_tokens_that_read_a_weight_each_are_taken_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    def few(
        x: torch.Tensor,
        weight: PackedWeight,
        out: torch.Tensor,
        experts: torch.Tensor,
        gated: bool,
    ) -> None:
        taken.append(len(x))
        out.copy_(reference.grouped_linear(x, weight, experts, gated))

    monkeypatch.setattr(module, "sparse_gemv", few)
    monkeypatch.setattr(module, "MOST_COPIES", 4)
    weight = weight_of("5:16-int4-g64", 3, 80, 64)
    x, out = torch.randn(10, 64, device=DEVICES[0]), torch.empty(10, 40, device=DEVICES[0])
    experts = torch.tensor([2, 2, 2, 0, 0, 0, 0, 1, 1, 1], dtype=torch.int32, device=DEVICES[0])
    module._multiply_grouped(x, weight, out, experts, True, 0)
    assert taken == [4, 4, 2]
    torch.testing.assert_close(out, reference.grouped_linear(x, weight, experts, True))


@on_card
@pytest.mark.parametrize("text", ["5:16-int4-g64", "dense-int8-g64"])
def test_more_tokens_than_a_grid_has_room_for(text: str) -> None:
    """In float16, for which there is no product by tensor cores; and of odd rows."""
    weight = weight_of(text, 3, 75, 64)
    x = torch.randn(70_001, 64, device="cuda", dtype=torch.float16)
    experts = torch.randint(3, (len(x),), device="cuda").sort().values.int()
    got = grouped_linear(x, weight, experts)
    for expert in range(3):
        own = experts == expert
        expected = x[own].double() @ unpack(weight.expert(expert)).double().T
        assert relative_error(got[own], expected) <= 1e-3


@on_card
@pytest.mark.parametrize("tokens", [1, 6, 7, 100, 1000, 5000])
@pytest.mark.parametrize("text", ["5:16-int4-g64", "dense-int4-g64", "dense-int8-g64"])
@pytest.mark.parametrize("gated", [False, True])
def test_slots_of_a_larger_stack_give_the_same_bits(text: str, tokens: int, gated: bool) -> None:
    weight = weight_of(text, 6, 200, 704)
    places = torch.tensor([9, 2, 14, 0, 7, 3], device="cuda")
    larger = {
        name: torch.zeros(16, *own.shape[1:], dtype=own.dtype, device="cuda").index_copy(
            0, places, own
        )
        for name, own in weight.tensors().items()
    }
    slots = from_tensors(weight.format, weight.rows, weight.columns, larger)
    x = torch.randn(tokens, 704, device="cuda", dtype=torch.bfloat16)
    experts = torch.randint(6, (tokens,), device="cuda").sort().values
    expected = grouped_linear(x, weight, experts.int(), gated)
    found = grouped_linear(x, slots, places[experts].int(), gated, among=6)
    assert torch.equal(found, expected)


@on_card
@pytest.mark.parametrize("tokens", [1, 4, 8, 16, 64, 128, 256])
def test_recorded_in_a_graph(tokens: int) -> None:
    weight = weight_of("5:16-int4-g128", 1024, 2048)
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    first = linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = [linear(x, weight) for _ in range(4)]
    x.copy_(torch.randn_like(x))
    for _ in range(3):
        graph.replay()
    expected = linear(x, weight)
    assert not torch.equal(first, expected)
    assert all(torch.equal(each, expected) for each in recorded)


@pytest.mark.parametrize("recorded", [True, False])
def test_scratch_memory_lives_as_long_as_a_graph_may(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what no graph has recorded is let go for a larger one."""
    monkeypatch.setattr(scratch_module, "_memory", {})
    monkeypatch.setattr(scratch_module, "_recorded", {})
    recording = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    small, large = (weight_of("5:16-int8-g64", rows, 64) for rows in (80, 200))
    with pytest.raises(KernelInputError, match="call the layer once"):
        recording = True
        scratch_module.scratch(small, torch.float32)
    recording = False
    scratch_module.scratch(small, torch.float32)
    memory = weakref.ref(scratch_module._memory[small.device])
    recording = recorded
    scratch_module.scratch(small, torch.float32)
    recording = False
    scratch_module.scratch(large, torch.float32)
    assert (memory() is not None) == recorded


@on_card
def test_a_graph_writes_to_nobody_elses_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger weight is expanded after it was recorded, and then memory is asked for."""
    monkeypatch.setattr(scratch_module, "_memory", {})
    small, large = (weight_of("5:16-int8-g64", rows, 2048) for rows in (1024, 4096))
    x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    expected = linear(x, small)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = linear(x, small)
    linear(x, large)
    others = [torch.zeros(1024, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    graph.replay()
    assert torch.equal(recorded, expected)
    assert not any(other.any() for other in others)
