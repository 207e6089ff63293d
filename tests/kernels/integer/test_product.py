"""Products of integers: the program for Hopper, emulated; the ops, on cards and by reference."""

import pytest
import torch
from torch import Tensor

from conclave.kernels import reference as exact
from conclave.kernels.formats import Format, PackedWeight
from conclave.kernels.integer import multiply
from conclave.kernels.integer.digits import SECOND, TALL, WIDE, Digits
from conclave.kernels.integer.product import _integer_product
from conclave.kernels.integer.reference import rounded, whole_numbers
from conclave.kernels.integer.weights import Ruler, whole_scales
from conclave.kernels.launching.launch import launches
from conclave.kernels.layouts import pack, scales_of, unpack
from conclave.kernels.linear import gated_linear, linear

from ..emulated_gluon import Emulated

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def digits_of(x: Tensor, max_error: float) -> Digits:
    """As `to_digits`, with rows in another order."""
    tokens, columns = x.shape
    whole, steps = whole_numbers(x, max_error)
    twos = (whole.abs() > 127).any(1)
    order = torch.cat(((~twos).nonzero().flip(0), twos.nonzero()))[:, 0]
    second = (whole / SECOND).round()
    codes = torch.stack((whole - second * SECOND, second)).char()[:, order]
    ones = int((~twos).sum())
    codes[1, :ones] = 55  # nobody may look at these
    marks = torch.zeros(1 + -(-tokens // TALL), 1 + 2 * (columns // WIDE), dtype=torch.int32)
    marks[0, :2] = torch.tensor((ones, tokens - ones))
    for tile, rows in enumerate(second[order].split(TALL), 1):
        blocks = rows.unflatten(1, (-1, WIDE)).ne(0).any(-1).any(0).nonzero().flatten().flip(0)
        marks[tile, 0] = len(blocks)
        marks[tile, 1 : 1 + len(blocks)] = blocks
    return Digits(codes, steps[order], order.int(), marks)


def rows_of(tokens: int, columns: int, outliers: int) -> Tensor:
    """Every other row has some; those are in the last block but for the first of them."""
    x = torch.randn(tokens, columns)
    if outliers:
        x[::2, -outliers:] = 40.0
        x[0, 0] = -40.0
    return x


@pytest.mark.parametrize("epilogue", [0, 1, 2], ids=["plain", "residual", "gated"])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "outliers", "programs"),
    [
        (1, 16, 128, 1, 1),
        (150, 272, 384, 2, 3),
        (130, 528, 256, 0, 6),
        (40, 256, 512, 512, 1),
        (300, 512, 128, 128, 2),
    ],
)
def test_emulated(
    tokens: int, rows: int, columns: int, outliers: int, programs: int, epilogue: int
) -> None:
    torch.manual_seed(0)
    x = rows_of(tokens, columns, outliers)
    made = digits_of(x, 0.01)
    weight = torch.randint(-120, 106, (rows, columns), dtype=torch.int8)
    units = torch.rand(rows) / columns
    residual = torch.randn(tokens, rows).bfloat16()
    out = torch.full((tokens + 2, rows // 2 if epilogue == 2 else rows), torch.nan).bfloat16()
    Emulated(_integer_product).launch(
        *(programs, out[1:-1], made.codes, weight, units, made.steps, made.owners, made.marks),
        *(residual if epilogue == 1 else None, tokens, rows, columns, 0.5),
        epilogue,
    )
    wanted = rounded(x, 0.01).double() @ (weight.double() * units.double()[:, None]).T
    if epilogue == 1:
        wanted = wanted + residual.double()
    if epilogue == 2:
        wanted = torch.nn.functional.gelu(wanted[:, ::2], approximate="tanh") * wanted[:, 1::2]
    assert out[[0, -1]].isnan().all()
    assert relative(out[1:-1], wanted * 0.5) <= 3e-3


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double().cpu() - wanted.cpu()).norm() / wanted.norm())


def whole_weight(format: str, rows: int, columns: int) -> PackedWeight:
    plain = pack(torch.randn(rows, columns) * columns**-0.5, Format.parse(format))
    assert plain.scales is not None
    scales = whole_scales(plain.scales)
    return pack(torch.randn(rows, columns) * columns**-0.5, plain.format, scales=scales)


@pytest.mark.parametrize("gated", [False, True])
def test_on_a_cpu_rows_are_rounded(gated: bool) -> None:
    torch.manual_seed(0)
    weight, x = whole_weight("5:16-int4-g128", 48, 256), rows_of(2, 256, 2)
    seen = rounded(x, 0.03)
    if gated:
        found, wanted = gated_linear(x, weight, 0.03), exact.gated_linear(seen, weight)
    else:
        added = torch.randn(2, 48)
        found = linear(x, weight, added, 0.5, 0.03)
        wanted = exact.linear(seen, weight, added, 0.5)
    assert torch.equal(found, wanted) and not torch.equal(seen, x)


def emulated(
    rows: Digits,
    weight: Tensor,
    units: Tensor,
    out: Tensor,
    residual: Tensor | None,
    scale: float,
    gated: bool,
) -> None:
    """`product.product`."""
    epilogue = 2 if gated else 0 if residual is None else 1
    Emulated(_integer_product).launch(
        *(3, out, rows.codes, weight, units, rows.steps, rows.owners, rows.marks, residual),
        *(rows.codes.shape[1], *weight.shape, scale, epilogue),
    )


@pytest.mark.parametrize("gated", [False, True])
def test_many_tokens_are_multiplied_in_parts(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own rows of the residual and of what is written."""
    torch.manual_seed(0)
    weight, x = whole_weight("5:16-int4-g128", 48, 256), rows_of(300, 256, 2).bfloat16()
    units = Ruler.of(scales_of(weight).float().T).units
    whole = (unpack(weight) / units[:, None]).round().char()
    monkeypatch.setattr(multiply, "scratch", lambda own, dtype: torch.empty(own.shape, dtype=dtype))
    monkeypatch.setattr(multiply, "row_units", lambda own: units)
    monkeypatch.setattr(multiply, "expand_integers", lambda own, units, out: out.copy_(whole))
    monkeypatch.setattr(multiply, "to_digits", digits_of)
    monkeypatch.setattr(multiply, "product", emulated)
    monkeypatch.setattr(multiply, "_parts", lambda *_: (slice(0, 128), slice(128, 384)))
    residual = None if gated else torch.randn(300, 48).bfloat16()
    out = torch.full((300, 24 if gated else 48), torch.nan).bfloat16()
    multiply.multiply(x, weight, out, residual, 0.5, gated, 0.01)
    seen = rounded(x, 0.01)
    if gated:
        wanted = exact.gated_linear(seen, weight) * 0.5
    else:
        wanted = exact.linear(seen, weight, residual, 0.5)
    assert relative(out, wanted.double()) <= 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs Hopper")
@pytest.mark.parametrize("format", ["5:16-int4-g128", "8:16-int4-g64", "dense-int4-g64"])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "outliers"),
    [
        *((1, 16, 128, 1), (3, 80, 384, 0), (17, 272, 640, 1), (255, 1040, 2816, 2)),
        *((300, 5376, 5376, 900), (2048, 5376, 2816, 1), (129, 21504, 5376, 5376)),
    ],
)
def test_awkward_shapes(tokens: int, rows: int, columns: int, outliers: int, format: str) -> None:
    torch.manual_seed(0)
    weight = whole_weight(format, rows, columns).to("cuda")
    x = rows_of(tokens, columns, outliers).bfloat16().cuda()
    residual = torch.randn(tokens, rows, device="cuda").bfloat16()
    seen = rounded(x, 0.01)
    before = launches()["integer_product", "bundle"] + launches()["integer_product", "jit"]
    for found, wanted in (
        (linear(x, weight, max_error=0.01), exact.linear(seen, weight)),
        (linear(x, weight, residual, 0.5, 0.01), exact.linear(seen, weight, residual, 0.5)),
        (gated_linear(x, weight, 0.01), exact.gated_linear(seen, weight)),
    ):
        assert relative(found, wanted.double()) <= 2**-8  # a row's eight results, rounded once
    after = launches()["integer_product", "bundle"] + launches()["integer_product", "jit"]
    assert after == before + 3


@pytest.mark.parametrize("columns", [128, 5376, 21504, 1 << 15])
def test_places_are_told_in_32_bits(columns: int) -> None:
    parts = list(multiply._parts(200_000, columns))
    lengths = [len(range(*part.indices(200_000))) for part in parts]
    assert sum(lengths) == 200_000 and (len(parts) > 1) == (columns > 5368)
    assert all(
        2 * length * columns <= 1 << 31 and part.start % TALL == 0
        for length, part in zip(lengths, parts, strict=True)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs Hopper")
def test_recorded_and_the_same_whatever_rows_are_beside() -> None:
    torch.manual_seed(0)
    weight = whole_weight("5:16-int4-g128", 1040, 1024).to("cuda")
    x = rows_of(700, 1024, 3).bfloat16().cuda()
    first = linear(x, weight, max_error=0.01)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = linear(x, weight, max_error=0.01)
    for _ in range(3):
        graph.replay()
        assert torch.equal(recorded, first)
    assert torch.equal(linear(x[300:], weight, max_error=0.01), first[300:])
