"""What is around the products of experts: chosen, sorted and summed as torch does it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conclave.kernels.errors import KernelInputError
from conclave.kernels.experts import ops, reference, routing
from conclave.kernels.launching.launch import launches

from .conftest import INTERPRETED

DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
DTYPE = DTYPES[0]
SIZES = [(1, 1), (4, 2), (6, 6), (48, 3), (128, 8), (200, 16), (256, 1), (1000, 13)]
"""Experts, and how many are active."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(2)


def check_choice(scores: Tensor, scale: Tensor, active: int) -> None:
    """Against float64, with the first experts of those that are equally likely."""
    weights, chosen = routing.choose(scores, scale, active)
    assert (weights.dtype, chosen.dtype) == (torch.float32, torch.int64)
    order = scores.double().argsort(dim=-1, descending=True, stable=True)[:, :active]
    assert torch.equal(chosen, order)
    shares = scores.double().softmax(-1).gather(-1, order)
    wanted = shares / shares.sum(-1, keepdim=True) * scale.double()[order]
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "active"), SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_likeliest_experts_are_chosen(
    tokens: int, experts: int, active: int, dtype: torch.dtype, device: torch.device
) -> None:
    scores = (torch.randn(tokens, experts, device=device) * 3).to(dtype)
    scale = (torch.rand(experts, device=device) + 0.5).to(dtype)
    check_choice(scores, scale, active)


@pytest.mark.kernel
@pytest.mark.parametrize(("experts", "active"), SIZES)
def test_of_equal_scores_the_first_come_first(
    experts: int, active: int, device: torch.device
) -> None:
    """Zeros of both signs, and experts without any chance, among them."""
    drawn = torch.randint(-1, 2, (5, experts), device=device)
    flipped = torch.randint(0, 2, (5, experts), device=device) * 2 - 1
    scores = (drawn.to(DTYPE) * 0.5) * flipped
    scale = torch.ones(experts, device=device, dtype=DTYPE)
    check_choice(scores, scale, active)
    scores[:, 1:] = scores[:, 1:].where(torch.rand(5, experts - 1, device=device) > 0.5, -torch.inf)
    check_choice(scores, scale, active)


@pytest.mark.kernel
@pytest.mark.parametrize(("experts", "active"), SIZES)
@pytest.mark.parametrize("odd", ["nan", "-nan", "inf", "all nan", "all -nan", "all -inf"])
def test_broken_scores_show_in_weights_alone(
    odd: str, experts: int, active: int, device: torch.device
) -> None:
    """One token's are; it has other experts of the layer all the same, each once."""
    scores = torch.randn(3, experts, device=device).to(DTYPE)
    scale = torch.ones(experts, device=device, dtype=DTYPE)
    whole = scores[[0, 2]]
    broken = torch.tensor(float(odd.removeprefix("all ")), dtype=DTYPE, device=device)
    scores[1, ... if odd.startswith("all") else experts // 2] = broken
    weights, chosen = routing.choose(scores, scale, active)
    assert weights[1].isnan().all() and not weights[[0, 2]].isnan().any()
    assert int(chosen.min()) >= 0 and int(chosen.max()) < experts
    assert len(chosen[1].unique()) == active
    for own, same in zip(routing.choose(whole, scale, active), (weights, chosen), strict=True):
        assert torch.equal(own, same[[0, 2]])


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 1008, 1040])
@pytest.mark.parametrize(
    ("tokens", "active", "experts"),
    [(0, 2, 4), (1, 1, 1), (1, 8, 128), (2, 8, 8), (3, 7, 9), (17, 6, 48), (17, 8, 48)],
)
def test_rows_are_sorted_by_expert(
    tokens: int, active: int, experts: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """As torch sorts them; some rows are NaN."""
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    hidden[1::3] = torch.nan
    chosen = torch.rand(tokens, experts, device=device).argsort(-1)[:, :active].contiguous()
    found = routing.dispatch(hidden, chosen)
    for own, wanted in zip(found, reference.dispatch(hidden, chosen), strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_as_many_rows_as_fit() -> None:
    chosen = torch.randint(0, 3, (routing.MOST_PAIRS // 4, 4), device="cuda")
    hidden = torch.randn(len(chosen), 16, device="cuda").to(DTYPE)
    for own, wanted in zip(
        routing.dispatch(hidden, chosen), reference.dispatch(hidden, chosen), strict=True
    ):
        assert torch.equal(own, wanted)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 240, 272, 2816])
@pytest.mark.parametrize(("tokens", "active"), [(0, 2), (1, 1), (1, 8), (3, 3), (9, 16)])
def test_rows_are_weighted_and_summed(
    tokens: int, active: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """In float32; what is NaN stays with its token."""
    outputs = torch.randn(tokens * active, width, device=device).to(dtype)
    weights = torch.rand(tokens, active, device=device)
    back = torch.randperm(tokens * active, device=device).view(tokens, active)
    broken = torch.zeros(tokens, dtype=torch.bool, device=device)
    if tokens > 1:
        outputs[back[1, -1]], broken[1] = torch.nan, True
    found = routing.combine(outputs, weights, back)
    assert found.dtype == dtype
    assert torch.equal(found.isnan().any(-1), broken) and torch.equal(found.isnan().all(-1), broken)
    wanted = (outputs.double()[back] * weights.double()[..., None]).sum(1)
    torch.testing.assert_close(
        found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5, equal_nan=True
    )


def some(**changed: Any) -> dict[str, Any]:
    """Tensors that fit."""
    return {
        **{"scores": torch.arange(16).view(2, 8).to(DTYPE), "scale": torch.ones(8, dtype=DTYPE)},
        **{"active": 2, "hidden": torch.zeros(2, 32, dtype=DTYPE)},
        **{"chosen": torch.zeros(2, 2, dtype=torch.int64), "weights": torch.zeros(2, 2)},
        **{"outputs": torch.zeros(4, 32, dtype=DTYPE)},
        **{"back": torch.zeros(2, 2, dtype=torch.int64)},
        **changed,
    }


OPS = {
    "choose": ("scores", "scale", "active"),
    "dispatch": ("hidden", "chosen"),
    "combine": ("outputs", "weights", "back"),
}


@pytest.mark.parametrize(
    ("op", "changed", "told"),
    [
        ("choose", {"scale": torch.ones(7, dtype=DTYPE)}, r"must be \[T, E\] and \[E\]"),
        ("choose", {"scale": torch.ones(8)}, "of one dtype"),
        ("choose", {"active": 0}, "0 of 8 experts; it takes 1 to 16"),
        ("choose", {"active": 9}, "9 of 8 experts"),
        ("choose", {"scores": torch.zeros(8, 2, dtype=DTYPE).t()}, "scores must be contiguous"),
        ("dispatch", {"chosen": torch.zeros(3, 2, dtype=torch.int64)}, r"chosen torch.int64 \(3,"),
        ("dispatch", {"chosen": torch.zeros(2, 2, dtype=torch.int32)}, "int64"),
        ("dispatch", {"chosen": torch.zeros(2, 513, dtype=torch.int64)}, "1026 pairs"),
        ("dispatch", {"hidden": torch.zeros(2, 32)}, "hidden is torch.float32"),
        ("dispatch", {"hidden": torch.zeros(2, 40, dtype=DTYPE)}, "a multiple of 16"),
        ("combine", {"weights": torch.zeros(2, 2, dtype=DTYPE)}, "float32 and int64"),
        ("combine", {"back": torch.zeros(2, 3, dtype=torch.int64)}, r"both \[T, active\]"),
        ("combine", {"outputs": torch.zeros(5, 32, dtype=DTYPE)}, "5 rows for 2 tokens of 2"),
        ("combine", {"outputs": torch.zeros(4, 40, dtype=DTYPE)}, "a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_named(op: str, changed: dict[str, Any], told: str) -> None:
    given = some(**changed)
    with pytest.raises(KernelInputError, match=told):
        getattr(routing, op)(*(given[name] for name in OPS[op]))


@pytest.mark.parametrize("op", OPS)
def test_ops_leave_a_cpu_to_torch(op: str) -> None:
    own = [some()[name] for name in OPS[op]]
    torch.testing.assert_close(getattr(ops, op)(*own), getattr(reference, op)(*own))


@pytest.mark.gpu
def test_ops_run_kernels_where_they_fit() -> None:
    """And torch for float32, many pairs, rows of odd widths and what is differentiated."""
    with torch.device("cuda"):
        given = some(active=2)
        whole = some(
            **{"scores": torch.zeros(2, 8), "scale": torch.ones(8), "active": 2},
            **{"hidden": torch.zeros(2, 32), "outputs": torch.zeros(4, 32)},
        )
        many = torch.zeros(2, 513, dtype=torch.int64)
        odd = torch.zeros(2, 33, dtype=DTYPE)

    def started(op: str, *own: Any) -> int:
        before = launches().total()
        found = getattr(ops, op)(*own)
        torch.testing.assert_close(found, getattr(reference, op)(*own))
        return launches().total() - before

    for op, names in OPS.items():
        own = [given[name] for name in names]
        assert started(op, *own) == 1
        assert started(op, *(whole[name] for name in names)) == 0
        learnt = [own[0].clone().requires_grad_(), *own[1:]]
        assert started(op, *learnt) == 0
        with torch.no_grad():
            assert started(op, *learnt) == 1
    assert started("dispatch", given["hidden"], many) == 0
    assert started("dispatch", odd, given["chosen"]) == 0
