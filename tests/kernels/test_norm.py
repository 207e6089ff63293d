"""Norms and the sums around them in one kernel, rounded as torch's calls one by one would be."""

import pytest
import torch
from torch import Tensor

from conclave.kernels.errors import KernelInputError
from conclave.kernels.norm import MOST, normed_sum, norms

from .conftest import INTERPRETED

DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
MOST_ERROR = 6e-4 if INTERPRETED else 4e-3
SIZES = [1, 7, 64, 96, 1000, 2816, 5376]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """In double, rounded once."""
    exact = x.double()
    normed = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (normed * weight.double()).to(x.dtype)


def check(found: list[Tensor], wanted: list[Tensor]) -> None:
    """The sum, and norms of it, are off by a rounding now and then."""
    assert len(found) == len(wanted)
    for own, true in zip(found, wanted, strict=True):
        assert own.shape == true.shape and own.dtype == true.dtype
        error = (own.double() - true.double()).norm() / true.double().norm()
        assert float(error) <= MOST_ERROR


class Drawn:
    """Two branches, a residual, a factor and two more weights, of rows of a size."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        torch.manual_seed(0)
        size = shape[-1]
        self.rows = [(torch.randn(shape, device=device) * 3).to(DTYPE) for _ in range(3)]
        self.weights = [(torch.rand(size, device=device) + 0.5).to(DTYPE) for _ in range(4)]
        self.scale = torch.full((1,), 0.75, device=device, dtype=DTYPE)

    @property
    def branches(self) -> list[tuple[Tensor, Tensor]]:
        return [*zip(self.rows[:2], self.weights[:2], strict=True)]


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5)])
@pytest.mark.parametrize("size", SIZES)
def test_norms_alone(size: int, shape: tuple[int, ...], device: torch.device) -> None:
    own = Drawn((*shape, size), device)
    found = norms(own.rows[0], own.weights[:2], 1e-6)
    check(found, [norm(own.rows[0], weight) for weight in own.weights[:2]])
    check(norms(own.rows[0], own.weights[2:3], 1e-6), [norm(own.rows[0], own.weights[2])])


@pytest.mark.kernel
@pytest.mark.parametrize("following", [0, 1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("size", [7, 2816, 5376])
def test_sums(
    size: int, branches: int, residual: bool, scaled: bool, following: int, device: torch.device
) -> None:
    own = Drawn((3, size), device)
    total = norm(*own.branches[0])
    if branches == 2:
        total = total + norm(*own.branches[1])
    if residual:
        total = own.rows[2] + total
    if scaled:
        total = total * own.scale
    after = own.weights[2 : 2 + following]
    found = normed_sum(
        own.branches[:branches],
        own.rows[2] if residual else None,
        own.scale if scaled else None,
        after,
        epsilon=1e-6,
    )
    check(found, [total, *(norm(total, weight) for weight in after)])


@pytest.mark.kernel
def test_results_are_all_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into memory that holds NaN, and nothing beside it: rows lie one behind the other."""
    memory = torch.full((6, 1000), torch.nan, device=device, dtype=DTYPE)
    given = iter((memory[1:3], memory[3:5]))
    monkeypatch.setattr(torch, "empty_like", lambda _: next(given))
    own = Drawn((2, 1000), device)
    normed_sum(own.branches[:1], own.rows[2], None, own.weights[2:3], epsilon=1e-6)
    assert memory[1:5].isfinite().all() and memory[[0, 5]].isnan().all()


@pytest.mark.kernel
def test_rows_do_not_mix(device: torch.device) -> None:
    """A row of NaN, of zeros, and of the largest numbers."""
    own = Drawn((4, 100), device)
    own.rows[0][1] = torch.nan
    own.rows[0][2] = 0.0
    (found,) = norms(own.rows[0], own.weights[:1], 1e-6)
    assert found[1].isnan().all() and (found[2] == 0).all()
    assert torch.equal(found[[0, 3]], norms(own.rows[0][[0, 3]], own.weights[:1], 1e-6)[0])
    (nothing,) = norms(own.rows[0][:0], own.weights[:1], 1e-6)
    assert nothing.shape == (0, 100)


def test_what_does_not_fit_is_refused() -> None:
    own = Drawn((3, 96), torch.device("cpu"))
    x, weight = own.branches[0]
    for branches, more in (
        ([], {}),
        ([(x, weight)] * 3, {}),
        ([(x.float(), weight)], {}),
        ([(x, weight.float())], {}),
        ([(x, weight[:95])], {}),
        ([(x[:, ::2], weight[::2])], {}),
        ([(x, weight)], {"residual": x[:2]}),
        ([(x, weight)], {"residual": x.T.contiguous().T}),
        ([(x, weight)], {"scale": weight}),
        ([(x, weight)], {"following": [weight] * 3}),
        ([(x.new_zeros(1, MOST + 1), weight.new_zeros(MOST + 1))], {}),
    ):
        with pytest.raises(KernelInputError, match="norms and sums"):
            normed_sum(branches, **more, epsilon=1e-6)
