"""Rows as integers: within the error, whatever numbers they hold; the kernel as the reference."""

import pytest
import torch
from torch import Tensor

from conclave.kernels.errors import KernelInputError
from conclave.kernels.integer.digits import SECOND, TALL, WIDE, Digits, to_digits
from conclave.kernels.integer.reference import rounded, whole_numbers

CPU = torch.device("cpu")
KINDS = ["normal", "uniform", "outliers", "heavy", "one", "zeros", "halves", "tiny", "huge"]


def rows_of(kind: str, tokens: int, columns: int, device: torch.device = CPU) -> Tensor:
    draw = torch.Generator().manual_seed(tokens * columns)
    x = torch.randn(tokens, columns, generator=draw)
    match kind:
        case "uniform":
            x = torch.rand(tokens, columns, generator=draw)
        case "outliers":
            x[:, 5] = 60.0
        case "heavy":
            x = x / torch.rand(tokens, columns, generator=draw).clamp(min=1e-4)
        case "one":
            x.zero_()[:, columns // 2] = -3.0
        case "zeros":
            x.zero_()
        case "halves":
            # Of the step that would be chosen, to the digit: the worst case of rounding.
            x = torch.full_like(x, 0.5)
            x[:, 0] = 40.0
        case "tiny":
            x *= 1e-34
        case "huge":
            x *= 1e37
    return x.bfloat16().to(device)


@pytest.mark.parametrize("max_error", [0.005, 0.01, 0.03])
@pytest.mark.parametrize("columns", [128, 384, 5376])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_within_the_error(kind: str, columns: int, max_error: float) -> None:
    x = rows_of(kind, 7, columns)
    whole, _ = whole_numbers(x, max_error)
    assert int(whole.abs().max()) <= 127 + 127 * SECOND
    exact, stored = x.double(), rounded(x, max_error).double()
    assert bool(((exact - stored).norm(dim=1) <= max_error * exact.norm(dim=1)).all())


def whole_of(made: Digits) -> tuple[Tensor, Tensor]:
    """What `whole_numbers` gives, of the kernel's digits."""
    ones = int(made.marks[0, 0])
    whole = made.codes[0].int()
    whole[ones:] += made.codes[1, ones:].int() * SECOND
    owner = made.owners.long()
    assert sorted(owner.tolist()) == list(range(len(owner)))
    return torch.empty_like(whole).index_copy(0, owner, whole), torch.empty_like(
        made.steps
    ).index_copy(0, owner, made.steps)


@pytest.mark.kernel
@pytest.mark.parametrize(("tokens", "columns"), [(1, 128), (3, 384), (140, 256), (17, 5376)])
@pytest.mark.parametrize("kind", [*KINDS, "some"])
def test_the_kernel(kind: str, tokens: int, columns: int, device: torch.device) -> None:
    x = rows_of("normal" if kind == "some" else kind, tokens, columns, device)
    if kind == "some":
        x[::3, -1] = 100.0
    wanted, steps = whole_numbers(x, 0.01)
    made = to_digits(x, 0.01)
    whole, own = whole_of(made)
    assert torch.allclose(own, steps, rtol=1e-5)
    # Halves may be rounded either way, as the last bit of what they were multiplied by differs.
    assert int((whole - wanted).abs().max()) <= 1
    assert float((whole != wanted).float().mean()) < 0.01
    _check_marks(made, tokens, columns)


def _check_marks(made: Digits, tokens: int, columns: int) -> None:
    """Each tile lists just the blocks in which a row has a second digit that is not zero."""
    ones, twos = made.marks[0, :2].tolist()
    assert ones + twos == tokens
    seconds = made.codes[1].clone()
    seconds[:ones] = 0
    for tile, (count, *listed) in enumerate(made.marks[1:].tolist()):
        own = seconds[tile * TALL : (tile + 1) * TALL].view(-1, columns // WIDE, WIDE)
        blocks = own.ne(0).any(-1).any(0).nonzero().flatten().tolist()
        assert sorted(listed[:count]) == blocks


@pytest.mark.kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_number_stays_none(value: float, device: torch.device) -> None:
    x = rows_of("normal", 3, 128, device)
    x[1, 7] = value
    _, steps = whole_of(to_digits(x, 0.01))
    assert steps.isnan().tolist() == [False, True, False]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("x", "max_error"),
    [
        (torch.zeros(2, 100), 0.01),
        (torch.zeros(2, 1 << 16), 0.01),
        (torch.zeros(2, 128), 0.001),
        (torch.zeros(128, 2).t(), 0.01),
    ],
    ids=["columns", "more columns", "error", "strides"],
)
def test_refused(x: Tensor, max_error: float, device: torch.device) -> None:
    with pytest.raises(KernelInputError, match="multiple of 128"):
        to_digits(x.to(device), max_error)
