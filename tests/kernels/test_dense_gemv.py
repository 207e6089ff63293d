"""One to four tokens times dense int4 and int8: against float64, edges of tiles and of lines."""

from collections.abc import Callable

import pytest
import torch

from conclave.kernels import dense_gemv as module
from conclave.kernels.dense_gemv import dense_gemv
from conclave.kernels.errors import KernelInputError
from conclave.kernels.layouts import Format, PackedWeight, pack, unpack

pytestmark = pytest.mark.kernel


def weight_of(text: str, device: torch.device, *shape: int) -> PackedWeight:
    return pack(torch.randn(shape), Format.parse(text)).to(device)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("text", "rows", "columns", "tokens", "dtype"),
    [
        ("dense-int4-g32", 80, 96, 1, torch.bfloat16),
        ("dense-int4-g32", 80, 96, 3, torch.float16),
        ("dense-int4-g64", 80, 704, 1, torch.bfloat16),
        ("dense-int4-g64", 200, 192, 4, torch.float32),
        ("dense-int4-g128", 80, 384, 2, torch.bfloat16),
        ("dense-int8-g32", 80, 96, 3, torch.bfloat16),
        ("dense-int8-g64", 200, 192, 1, torch.float32),
        ("dense-int8-g128", 80, 256, 2, torch.bfloat16),
    ],
)
def test_against_float64(
    text: str,
    rows: int,
    columns: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    round_off: dict[torch.dtype, float],
) -> None:
    weight = weight_of(text, device, rows, columns)
    x = torch.randn(tokens, columns, device=device, dtype=dtype)
    out = torch.full((tokens, rows), torch.nan, device=device, dtype=dtype)
    dense_gemv(x, weight, out)
    expected = x.double() @ unpack(weight).double().T
    assert relative_error(out, expected) <= round_off[dtype]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 4])
def test_every_code_in_every_column(bits: int, tokens: int, device: torch.device) -> None:
    """Sums of integers have no error at all: the residual takes away what bfloat16 would round."""
    most = 1 << (bits - 1)
    values = torch.arange(-most, most, dtype=torch.float32)
    codes = torch.stack([values.roll(column) for column in range(32)], 1)
    codes = codes.repeat(128 // len(codes) or 1, 1)
    ones = torch.ones(1, len(codes), dtype=torch.bfloat16)
    weight = pack(codes, Format.parse(f"dense-int{bits}-g32"), scales=ones).to(device)
    largest = 3900 // len(values)  # what bfloat16 rounds of a sum is an integer below 256
    x = torch.randint(-largest, largest, (tokens, 32), device=device).bfloat16()
    exact = (x.double() @ codes.double().T.to(device)).float()
    residual = -exact.bfloat16()
    out = torch.full_like(residual, torch.nan)
    dense_gemv(x, weight, out, residual)
    assert torch.equal(out.float(), exact + residual.float())


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("splits", [1, 3])
def test_any_share_of_the_work(
    warps: int,
    splits: int,
    device: torch.device,
    round_off: dict[torch.dtype, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More warps than pieces, a line without its neighbour."""
    monkeypatch.setattr(module, "dense_plan", lambda *_: (warps, splits))
    for text, columns in (("dense-int4-g32", 160), ("dense-int8-g32", 96)):
        weight = weight_of(text, device, 16, columns)
        x = torch.randn(1, columns, device=device)
        out = torch.full((1, 16), torch.nan, device=device)
        dense_gemv(x, weight, out)
        expected = x.double() @ unpack(weight).double().T
        assert relative_error(out, expected) <= round_off[torch.float32]


@pytest.mark.parametrize("text", ["dense-int4-g64", "dense-int8-g64"])
def test_residual_scale_and_wild_values(
    text: str, device: torch.device, round_off: dict[torch.dtype, float]
) -> None:
    weight = weight_of(text, device, 144, 64)
    x = torch.randn(4, 64, device=device)
    x *= torch.tensor([1.0, 1e-20, 1e20, 300.0], device=device)[:, None]
    x[:, 10:20] = 0
    residual = torch.randn(4, 144, device=device)
    out = torch.full((4, 144), torch.nan, device=device)
    dense_gemv(x, weight, out, residual=residual, scale=0.5)
    expected = (x.double() @ unpack(weight).double().T + residual) * 0.5
    for token in range(4):
        assert relative_error(out[token], expected[token]) <= round_off[torch.float32]


def test_gated(device: torch.device) -> None:
    """Rows 2i and 2i + 1 are a gate and its input."""
    weight = weight_of("dense-int8-g64", device, 144, 64)
    x = torch.randn(3, 64, device=device)
    out = torch.full((3, 72), torch.nan, device=device)
    dense_gemv(x, weight, out, gated=True)
    exact = x.double() @ unpack(weight).double().T
    expected = torch.nn.functional.gelu(exact[:, ::2], approximate="tanh") * exact[:, 1::2]
    assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("text", ["dense-int4-g32", "dense-int8-g64"])
def test_each_token_by_its_own_expert(
    text: str, device: torch.device, round_off: dict[torch.dtype, float]
) -> None:
    weight = weight_of(text, device, 6, 80, 64)
    experts = torch.tensor([5, 0, 3, 3, 1], dtype=torch.int32, device=device)
    x = torch.randn(5, 64, device=device)
    out = torch.full((5, 80), torch.nan, device=device)
    dense_gemv(x, weight, out, experts=experts)
    expected = torch.einsum("tk,trk->tr", x.double(), unpack(weight).double()[experts.long()])
    assert relative_error(out, expected) <= round_off[torch.float32]


def test_twice_the_same(device: torch.device) -> None:
    weight = weight_of("dense-int4-g64", device, 128, 384)
    x = torch.randn(1, 384, device=device)
    outs = [torch.empty(1, 128, device=device) for _ in range(2)]
    for out in outs:
        dense_gemv(x, weight, out)
    assert torch.equal(*outs)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    weight = weight_of("dense-int4-g64", device, 32, 64)
    x, out = torch.zeros(1, 64, device=device), torch.zeros(1, 32, device=device)
    stack = weight_of("dense-int4-g64", device, 2, 32, 64)
    sparse = weight_of("5:16-int4-g64", device, 32, 64)
    wrong: dict[str, Callable[[], object]] = {
        "x is": lambda: dense_gemv(x[:, :32], weight, out),
        "takes dense int4 and int8": lambda: dense_gemv(x, sparse, out),
        "1 to 4": lambda: dense_gemv(x.expand(5, -1), weight, out.expand(5, -1)),
        "out is": lambda: dense_gemv(x, weight, out.double()),
        "residual is": lambda: dense_gemv(x, weight, out, residual=out[:, :1]),
        "needs `experts`": lambda: dense_gemv(x, stack, out),
        "experts is": lambda: dense_gemv(x, stack, out, experts=torch.zeros(1, device=device)),
        "no residual": lambda: dense_gemv(x, weight, out[:, :16], residual=out, gated=True),
        "not contiguous": lambda: dense_gemv(
            x.expand(2, -1), weight, torch.zeros(2, 32, device=device)
        ),
        "x is torch.float64": lambda: dense_gemv(x.double(), weight, out.double()),
    }
    for message, call in wrong.items():
        with pytest.raises(KernelInputError, match=message):
            call()
