"""Attention of a chunk over heads of 512 numbers: the program for Hopper, there and emulated."""

import pytest
import torch
from torch import Tensor

from conclave.kernels.attention import prefill_wide as wide
from conclave.kernels.attention.prefill import prefill
from conclave.kernels.attention.wide_scratch import MOST_PROCESSORS, Scratch
from conclave.kernels.launching.launch import launches
from conclave.kernels.launching.targets import ALL, NVIDIA

from .emulated_gluon import Emulated
from .test_prefill_attention import truth

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
MOST_ERROR = 3e-3
"""Probabilities and outputs are rounded to bfloat16."""


def drawn(
    queries: int, keys: int, heads: tuple[int, int], offset: int, spread: float, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the answer; what nobody sees is no number."""
    torch.manual_seed(0)
    query = torch.randn(queries, heads[0], 512, device=device) / 512**0.5 * spread
    key, value = torch.randn(2, heads[1], keys, 512, device=device).bfloat16()
    wanted = truth(query.bfloat16(), key, value, offset, None)
    key[:, offset + queries :] = torch.nan
    value[:, offset + queries :] = torch.nan
    return query.bfloat16(), key, value, wanted


def check(memory: Tensor, wanted: Tensor) -> None:
    """`memory` is the answer between two tokens that nobody was to write."""
    assert memory[[0, -1]].isnan().all()
    assert float((memory[1:-1].double() - wanted).norm() / wanted.norm()) <= MOST_ERROR


@pytest.mark.parametrize(
    ("queries", "keys", "offset", "heads", "programs", "span", "spread"),
    [
        (1, 1, 0, (1, 1), 1, 192, 2.0),
        (17, 90, 60, (2, 1), 3, 192, 2.0),
        (130, 400, 255, (4, 2), 3, 192, 2.0),
        (129, 330, 201, (2, 1), 1, 128, 30.0),
    ],
)
def test_emulated(
    queries: int,
    keys: int,
    offset: int,
    heads: tuple[int, int],
    programs: int,
    span: int,
    spread: float,
) -> None:
    """Rows and tiles that are not full, several programs and spans, one after the other."""
    query, key, value, wanted = drawn(queries, keys, heads, offset, spread, "cpu")
    memory = torch.full((queries + 2, heads[0], 512), torch.nan, dtype=torch.bfloat16)
    shares = torch.full((programs * span * 64,), -1, dtype=torch.int32)
    marks = torch.full((programs * span * 2,), torch.nan)
    sums = torch.full((programs * 128 * 512,), torch.nan)
    Emulated(wide._prefill_wide).launch(
        *(programs, memory[1:-1], query, key, value, shares, marks, sums, queries, keys),
        *(heads[0], heads[0] // heads[1], offset, span),
    )
    check(memory, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs Hopper")
@pytest.mark.parametrize(
    ("queries", "keys", "offset"),
    [
        *((1, 1, 0), (1, 5000, 4999), (3, 3, 0), (3, 70, 60), (17, 17, 0), (17, 4300, 4200)),
        *((255, 255, 0), (255, 3001, 2000), (777, 5001, 3333), (2048, 2048, 0)),
    ],
)
@pytest.mark.parametrize("heads", [(1, 1), (16, 2)], ids=str)
def test_on_hopper(queries: int, keys: int, offset: int, heads: tuple[int, int]) -> None:
    query, key, value, wanted = drawn(queries, keys, heads, offset, 2.0, "cuda")
    memory = query.new_full((queries + 2, heads[0], 512), torch.nan)
    wide.prefill_wide(query, key, value, offset, memory[1:-1])
    check(memory, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs Hopper")
def test_prefill_takes_it() -> None:
    query, key, value, wanted = drawn(200, 900, (8, 2), 650, 2.0, "cuda")
    memory = query.new_full((202, 8, 512), torch.nan)
    before = sum(n for (name, _), n in launches().items() if name == "prefill_wide")
    prefill(query, key, value, 650, None, memory[1:-1])
    check(memory, wanted)
    assert sum(n for (name, _), n in launches().items() if name == "prefill_wide") == before + 1


def test_what_it_takes() -> None:
    (hopper,) = (target for target in NVIDIA if target.capability == 90)
    query = torch.empty(100, 2, 512, dtype=torch.bfloat16, device="meta")
    assert wide.takes(query, 100, None, hopper) and wide.takes(query, 100, 100, hopper)
    assert not wide.takes(query, 100, 99, hopper)
    assert not wide.takes(query[:1], 100, None, hopper)
    assert not wide.takes(query.half(), 100, None, hopper)
    assert not wide.takes(query[..., :256], 100, None, hopper)
    others = [None, *(target for target in ALL if target != hopper)]
    assert not any(wide.takes(query, 100, None, target) for target in others)


def test_it_leaves_to_others_what_needs_places_of_64_bits() -> None:
    (hopper,) = (target for target in NVIDIA if target.capability == 90)
    few, most, more = (
        torch.empty(128, heads, 512, dtype=torch.bfloat16, device="meta")
        for heads in (32, 32768, 32769)
    )
    assert wide.takes(few, 1 << 22, None, hopper) and wide.takes(most, 128, None, hopper)
    assert not wide.takes(few, (1 << 22) + 1, None, hopper)
    assert not wide.takes(more, 128, None, hopper)


@pytest.mark.parametrize(
    ("queries", "heads", "keys", "programs"),
    [(64, 2, 64, 2), (129, 16, 1000, 32), (8192, 32, 1 << 20, MOST_PROCESSORS)],
)
def test_scratch_memory_is_what_is_planned(
    queries: int, heads: int, keys: int, programs: int
) -> None:
    for processors in (1, 114, MOST_PROCESSORS, 1000):
        scratch = Scratch.of(queries, heads, keys, processors)
        assert scratch.programs == min(processors, programs)
        assert scratch.span >= min(keys, 33 * 64) and scratch.span % 64 == 0
        made = wide._made(scratch, torch.device("meta"))
        assert sum(each.nbytes for each in made) == scratch.bytes
        assert scratch.bytes <= Scratch.of(queries, heads, keys).bytes <= 108_201_984
