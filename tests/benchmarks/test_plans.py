"""The plans that `benchmarks.tune_kernels` tries, and the keys it writes."""

import pytest
import torch

from benchmarks.plans import Asked, answered, key_of, plans_for, questions, rule_of
from conclave.kernels import sparse_gemv, tuning
from conclave.kernels.tensor_cores import matmul
from conclave.kernels.workspace import PARTIALS

FEW = Asked("gemv_plan", (168, 84, 1, 1))
DENSE = Asked("dense_plan", (4, 168, 84, 1, 1))
MANY = Asked("matmul_splits", (168, 42, 2, 64, 2))


def test_what_is_written_is_what_kernels_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"some card": {key_of(FEW): [2, 3, 1], key_of(DENSE): [4, 6], key_of(MANY): [5]}}
    monkeypatch.setattr(tuning, "_card", lambda device: ("some card", 132))
    monkeypatch.setattr(tuning, "_table", lambda: table)
    for function in (tuning.gemv_plan, tuning.dense_plan, tuning.matmul_splits):
        function.cache_clear()
    device = torch.device("cpu")
    try:
        assert tuning.gemv_plan(device, *FEW.arguments) == (2, 3, 1)
        assert tuning.dense_plan(device, *DENSE.arguments) == (4, 6)
        assert tuning.matmul_splits(device, *MANY.arguments) == 5
    finally:
        for function in (tuning.gemv_plan, tuning.dense_plan, tuning.matmul_splits):
            function.cache_clear()


@pytest.mark.parametrize("arguments", [(168, 84, 1, 1), (42, 336, 4, 1), (11, 44, 1, 64)])
def test_plans_for_few_tokens_fit(arguments: tuple[int, ...]) -> None:
    tiles, pieces, tokens, copies = arguments
    plans = plans_for(Asked("gemv_plan", arguments))
    assert {ahead for _, _, ahead in plans} == {0, 2} and len(plans) > 10
    for _, splits, _ in plans:
        assert 1 <= splits <= pieces
        assert splits == 1 or splits * tiles * 128 * tokens * copies <= PARTIALS


def test_plans_for_many_tokens_leave_no_program_idle() -> None:
    for arguments in ((168, 42, 1, 16, 4), (42, 168, 1, 128, 1), (336, 42, 2, 64, 2)):
        plans = plans_for(Asked("matmul_splits", arguments))
        assert (1,) in plans and rule_of(Asked("matmul_splits", arguments), 132)
        for (splits,) in plans:
            each = -(-arguments[1] // splits)
            assert (splits - 1) * each < arguments[1]


def ask_gemv() -> object:
    return vars(sparse_gemv)["gemv_plan"](torch.device("cpu"), *FEW.arguments)


def test_kernels_get_the_answers_given() -> None:
    before = ask_gemv()
    with answered("gemv_plan", lambda *_: (4, 7)), answered("matmul_splits", lambda *_: 9):
        assert ask_gemv() == (4, 7)
        assert vars(matmul)["matmul_splits"]() == 9
    assert ask_gemv() == before


def test_questions_are_told_once() -> None:
    assert questions(lambda: [ask_gemv() for _ in range(2)]) == [FEW]
