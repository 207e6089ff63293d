"""Survivors go where they are needed, and not more of them than asked for."""

import itertools
import random

import pytest
import torch

from conclave.worker.compress.allocation import CHOICES, Sensitivity, allot, sensitivity
from conclave.worker.errors import ConfigError


def error_of(found: dict[str, Sensitivity], chosen: dict[str, int]) -> float:
    return sum(found[name].errors[kept] for name, kept in chosen.items())


def sparsity_of(found: dict[str, Sensitivity], chosen: dict[str, int]) -> float:
    total = sum(each.weights for each in found.values())
    return 1 - sum(found[name].weights * kept for name, kept in chosen.items()) / 16 / total


def random_matrices(count: int, seed: int, equal: bool) -> dict[str, Sensitivity]:
    draw = random.Random(seed)
    found = {}
    for number in range(count):
        size, scale, power = (
            100 if equal else draw.randrange(50, 500),
            draw.random(),
            1 + draw.random(),
        )
        errors = {kept: scale * (1 - kept / 16) ** (2 * power) for kept in CHOICES}
        found[f"m{number}"] = Sensitivity(size, errors)
    return found


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.6875, 0.7, 0.75])
@pytest.mark.parametrize("seed", range(5))
def test_as_sparse_as_asked_and_nearly_nothing_left_over(sparsity: float, seed: int) -> None:
    found = random_matrices(60, seed, equal=False)
    chosen = allot(found, sparsity)
    assert sparsity <= sparsity_of(found, chosen) + 1e-9
    assert sparsity_of(found, chosen) < sparsity + 0.02


@pytest.mark.parametrize("seed", range(8))
def test_nearly_the_best_of_all_choices(seed: int) -> None:
    found = random_matrices(5, seed, equal=True)
    best = min(
        error_of(found, chosen)
        for kept in itertools.product(CHOICES, repeat=5)
        if sparsity_of(found, chosen := dict(zip(found, kept, strict=True))) >= 0.6875
    )
    chosen = allot(found, 0.6875)
    assert error_of(found, chosen) <= 1.06 * best
    assert error_of(found, chosen) <= error_of(found, dict.fromkeys(found, 5))


def test_matrices_of_a_kind_have_the_same_n() -> None:
    """As if they were one matrix; a kind of its own each is none."""
    found = random_matrices(12, 3, equal=False)
    chosen = allot(found, 0.6875, lambda name: name[-1] if name < "m6" else name)
    assert sparsity_of(found, chosen) >= 0.6875
    kinds: dict[str, set[int]] = {}
    for name, kept in chosen.items():
        kinds.setdefault(name[-1] if name < "m6" else name, set()).add(kept)
    assert all(len(own) == 1 for own in kinds.values()) and len(kinds) < 12
    assert allot(found, 0.6875) == allot(found, 0.6875, str)


def test_out_of_reach() -> None:
    found = random_matrices(3, 0, equal=True)
    for sparsity in (0.4, 0.8):
        with pytest.raises(ConfigError, match=r"4:16 to 8:16 are 0.5 to 0.75"):
            allot(found, sparsity)


def test_matrices_that_hurt_get_more() -> None:
    """One whose rows live from few weights bears pruning; one of equal weights does not."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 64)
    peaked, flat = torch.randn(32, 64) ** 5, torch.sign(torch.randn(32, 64))
    found = {
        name: sensitivity(weight, inputs.T @ inputs)
        for name, weight in (("peaked", peaked), ("flat", flat))
    }
    assert all(found["peaked"].errors[kept] < found["flat"].errors[kept] for kept in CHOICES)
    errors = found["flat"].errors
    assert sorted(errors.values(), reverse=True) == [errors[kept] for kept in CHOICES]
    chosen = allot(found, 0.6875)
    assert chosen["flat"] > chosen["peaked"]
