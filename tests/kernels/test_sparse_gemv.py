"""A few tokens times N:16 int4: against float64, edges of tiles, every output written."""

from collections.abc import Callable

import pytest
import torch

from conclave.kernels.errors import KernelInputError
from conclave.kernels.layouts import Format, PackedWeight, pack, unpack
from conclave.kernels.sparse_gather import sparse_gather
from conclave.kernels.sparse_gemv import sparse_gemv
from conclave.kernels.workspace import workspace

pytestmark = pytest.mark.kernel

Few = Callable[..., None]


@pytest.fixture(params=[sparse_gather, sparse_gemv], ids=lambda op: op.__name__)
def few(request: pytest.FixtureRequest) -> Few:
    op: Few = request.param
    return op


def weight_of(text: str, device: torch.device, *shape: int) -> PackedWeight:
    return pack(torch.randn(shape), Format.parse(text)).to(device)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize(
    ("text", "rows", "columns"),
    [
        ("5:16-int4-g128", 80, 384),
        ("5:16-int4-g64", 200, 704),
        ("1:16-int4-g64", 16, 64),
    ],
)
def test_against_float64(
    text: str,
    rows: int,
    columns: int,
    tokens: int,
    few: Few,
    device: torch.device,
    round_off: dict[torch.dtype, float],
) -> None:
    weight = weight_of(text, device, rows, columns)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(tokens, columns, device=device, dtype=dtype)
        out = torch.full((tokens, rows), torch.nan, device=device, dtype=dtype)
        few(x, weight, out)
        expected = x.double() @ unpack(weight).double().T
        # Pairs of tokens are summed in float16 within 64 columns.
        most = 2e-3 if tokens > 1 and dtype == torch.float32 else round_off[dtype]
        assert relative_error(out, expected) <= most


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_pairs_of_tokens_of_any_size(
    tokens: int, device: torch.device, round_off: dict[torch.dtype, float]
) -> None:
    """Each token has a power of two of its own; several programs for each tile."""
    for text, rows, columns in (("5:16-int4-g64", 144, 1344), ("8:16-int4-g128", 16, 128)):
        weight = weight_of(text, device, rows, columns)
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
        x *= 10.0 ** torch.randint(-9, 9, (tokens, 1), device=device)
        out = torch.full((tokens, rows), torch.nan, device=device, dtype=torch.bfloat16)
        sparse_gemv(x, weight, out)
        expected = x.double() @ unpack(weight).double().T
        for token in range(tokens):
            assert relative_error(out[token], expected[token]) <= round_off[torch.bfloat16]
        halves = torch.full((tokens, rows // 2), torch.nan, device=device, dtype=torch.bfloat16)
        small = x / x.abs().amax(1, keepdim=True)
        sparse_gemv(small, weight, halves, gated=True)
        exact = small.double() @ unpack(weight).double().T
        gate = torch.nn.functional.gelu(exact[:, ::2], approximate="tanh")
        # Of few products one may be nearly all, and its rounding the whole error.
        assert relative_error(halves, gate * exact[:, 1::2]) <= 1.5 * round_off[torch.bfloat16]


@pytest.mark.parametrize("splits", [17, 24])
def test_many_programs_for_a_tile(
    splits: int,
    few: Few,
    device: torch.device,
    round_off: dict[torch.dtype, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of more than sixteen sums of four tokens are added in groups; counters are zero again."""
    monkeypatch.setattr(f"{few.__module__}.gemv_plan", lambda *_: (1, splits, 0))
    weight = weight_of("5:16-int4-g64", device, 144, 24 * 64)
    residual = torch.randn(4, 144, device=device, dtype=torch.bfloat16)
    x = torch.randn(4, 24 * 64, device=device, dtype=torch.bfloat16)
    outs = [torch.full_like(residual, torch.nan) for _ in range(2)]
    for out in outs:
        few(x, weight, out, residual=residual)
    expected = x.double() @ unpack(weight).double().T + residual
    assert relative_error(outs[0], expected) <= round_off[torch.bfloat16]
    assert torch.equal(*outs)
    assert not workspace(device)[1].any()


def test_residual_scale_and_wild_values(
    few: Few, device: torch.device, round_off: dict[torch.dtype, float]
) -> None:
    """Tokens of 1e-20 beside 1e20, columns of zeros: halves are scaled for every 64 columns."""
    weight = weight_of("5:16-int4-g64", device, 144, 256)
    for tokens in (1, 2, 4):
        x = torch.randn(tokens, 256, device=device)
        x[:, :64] = 0
        x *= torch.tensor([1.0, 1e-20, 1e20, 300.0], device=device)[:tokens, None]
        residual = torch.randn(tokens, 144, device=device)
        out = torch.full((tokens, 144), torch.nan, device=device)
        few(x, weight, out, residual=residual, scale=0.5)
        expected = (x.double() @ unpack(weight).double().T + residual) * 0.5
        for token in range(tokens):
            assert relative_error(out[token], expected[token]) <= 2e-3


def test_each_token_by_its_own_expert(
    few: Few, device: torch.device, round_off: dict[torch.dtype, float]
) -> None:
    weight = weight_of("5:16-int4-g64", device, 6, 176, 128)
    experts = torch.tensor([5, 0, 3, 3, 1], dtype=torch.int32, device=device)
    x = torch.randn(5, 128, device=device)
    out = torch.full((5, 176), torch.nan, device=device)
    few(x, weight, out, experts=experts)
    expected = torch.einsum("tk,trk->tr", x.double(), unpack(weight).double()[experts.long()])
    assert relative_error(out, expected) <= round_off[torch.float32]


def test_gated(few: Few, device: torch.device, round_off: dict[torch.dtype, float]) -> None:
    """Rows 2i and 2i + 1 are a gate and its input; large ones neither overflow nor leak NaN."""
    weight = weight_of("5:16-int4-g64", device, 144, 256)
    for tokens in (1, 3):
        x = torch.randn(tokens, 256, device=device) * 30
        out = torch.full((tokens, 72), torch.nan, device=device)
        few(x, weight, out, gated=True)
        exact = x.double() @ unpack(weight).double().T
        expected = torch.nn.functional.gelu(exact[:, ::2], approximate="tanh") * exact[:, 1::2]
        assert relative_error(out, expected) <= 2e-3


def test_twice_the_same(few: Few, device: torch.device) -> None:
    weight = weight_of("5:16-int4-g64", device, 256, 1024)
    x = torch.randn(1, 1024, device=device)
    outs = [torch.empty(1, 256, device=device) for _ in range(3)]
    for out in outs:
        few(x, weight, out)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_what_does_not_fit_is_refused(few: Few, device: torch.device) -> None:
    weight = weight_of("5:16-int4-g64", device, 32, 64)
    x, out = torch.zeros(1, 64, device=device), torch.zeros(1, 32, device=device)
    stack = weight_of("5:16-int4-g64", device, 2, 32, 64)
    eight = weight_of("5:16-int8-g64", device, 32, 64)
    wrong: dict[str, Callable[[], object]] = {
        r"tokens, 64\]": lambda: few(x[:, :32], weight, out),
        "takes N:16 int4": lambda: few(x, eight, out),
        "it takes 1 to": lambda: few(x.expand(9, -1), weight, out.expand(9, -1)),
        "out is": lambda: few(x, weight, out.double()),
        "residual is": lambda: few(x, weight, out, residual=out[:, :1]),
        "even number": lambda: few(x, weight, out[:, ::2], residual=out[:, ::2], gated=True),
        "needs `experts`": lambda: few(x, stack, out),
        "experts is": lambda: few(x, stack, out, experts=torch.zeros(1, device=device)),
        "not contiguous": lambda: sparse_gemv(
            x.expand(2, -1), weight, torch.zeros(2, 32, device=device)
        ),
        "x is": lambda: few(x.double(), weight, out.double()),
    }
    for message, call in wrong.items():
        with pytest.raises(KernelInputError, match=message):
            call()
