"""Decode attention against the plain reference: formats, lengths, windows, splits, groups."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from conclave.kernels.attention import decode as module
from conclave.kernels.attention.cache import KeyRule, KVFormat, NarrowCache, Overflow
from conclave.kernels.attention.decode import decode
from conclave.kernels.attention.mma.decode import decode_mma
from conclave.kernels.attention.reference import attention, store
from conclave.kernels.attention.splits import splits_of
from conclave.kernels.errors import KernelInputError
from conclave.kernels.launching.targets import ALL
from conclave.kernels.reference import paged_attention, plan_pages

pytestmark = pytest.mark.kernel

PAGE = 8
MOST_ERROR = 1e-3
"""Of float32 outputs: q' and probabilities are rounded to 16 and 11 bits, cosines to 11."""


def rule_of(head_dim: int, pairs: int, positions: int, device: torch.device) -> KeyRule:
    angles = torch.arange(positions)[:, None] * 0.3 ** torch.arange(pairs)
    weight = torch.rand(head_dim) + 0.5
    return KeyRule(weight.to(device), angles.cos().to(device), angles.sin().to(device))


class Case:
    """A filled narrow cache and queries; what no row may read is NaN, or off the pool's end."""

    def __init__(
        self,
        format: KVFormat,
        group: int,
        lengths: list[int],
        device: torch.device,
        limit: float,
        window: int | None = None,
        page: int = PAGE,
    ) -> None:
        torch.manual_seed(0)
        self.window = window
        dim, kv_heads = format.head_dim, format.kv_heads
        most = max(lengths)
        blocks = -(-most // page) + 1
        pages = blocks * len(lengths) + 3
        self.rule = (
            None if format.pairs is None else rule_of(dim, format.pairs, most + 2 * page, device)
        )
        self.cache = NarrowCache.empty(format, pages, page, Overflow.empty(format, 4096, device))
        shuffled = torch.randperm(pages - 1, device=device) + 1
        self.tables = shuffled[: blocks * len(lengths)].view(len(lengths), blocks)
        self.offsets = torch.tensor(lengths, device=device) - 1
        failed = torch.zeros(most, dtype=torch.bool, device=device)
        unread = torch.ones(pages, dtype=torch.bool, device=device)
        for row, length in enumerate(lengths):
            value = torch.randn(length, kv_heads, dim, device=device)
            key = torch.randn_like(value) / dim**0.5 if format.pairs is None else None
            limits = torch.full((length,), 1.0, device=device)
            limits[length // 3 :: 5] = limit
            at = torch.arange(length, device=device)
            slots = self.tables[row, at // page] * page + at % page
            store(key, value, self.cache, slots, limits, failed[:length], self.rule)
            first = 0 if window is None else max(0, length - window)
            unread[self.tables[row, first // page : (length - 1) // page + 1]] = False
        self.query = torch.randn(len(lengths), kv_heads * group, dim, device=device)
        pages_ = plan_pages(
            self.tables, self.offsets, window, queries=1, block_size=page, dtype=torch.float32
        )
        self.wanted = attention(self.query[:, None], self.cache, pages_, self.rule)[:, 0]
        self.cache.scales[unread] = torch.nan
        self.cache.second[unread] = 1 << 20

    def error(self, dtype: torch.dtype = torch.float32) -> float:
        query = self.query.to(dtype)
        out = torch.full_like(query, torch.nan)
        decode(query, self.cache, self.tables, self.offsets, self.window, self.rule, out)
        return float((out.double() - self.wanted).norm() / self.wanted.norm())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("limit", [1.0, 1e-3], ids=["one digit", "two"])
@pytest.mark.parametrize(
    ("head_dim", "pairs"),
    [
        *[(24, None), (64, None), (128, None), (256, None), (128, 16), (64, 16), (24, 3)],
        *[(64, 0), (128, 0), (128, 32), (256, 64)],
    ],
    ids=str,
)
def test_narrow(
    bits: int, limit: float, head_dim: int, pairs: int | None, device: torch.device
) -> None:
    case = Case(KVFormat(2, head_dim, bits, pairs), 2, [70, 1, 9], device, limit)
    assert bool(case.cache.tally[1]) == (limit < 1)
    assert case.error() <= MOST_ERROR


@pytest.mark.parametrize("group", [1, 8, 5, 9])
@pytest.mark.parametrize("pairs", [16, 32])
def test_groups(group: int, pairs: int, device: torch.device) -> None:
    case = Case(KVFormat(2, 128, 8, pairs), group, [20, 66], device, 1.0)
    assert case.error() <= MOST_ERROR


@pytest.mark.parametrize("window", [1, 5, 24, 70, 1000])
@pytest.mark.parametrize(("head_dim", "pairs"), [(64, None), (64, 16), (128, None), (128, 32)])
def test_windows(window: int, head_dim: int, pairs: int | None, device: torch.device) -> None:
    case = Case(KVFormat(1, head_dim, 8, pairs), 2, [200, 7, 64, 65], device, 1e-3, window)
    assert case.error() <= MOST_ERROR


@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_splits(
    splits: int, head_dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows shorter than the splits; twice the same bits."""
    monkeypatch.setattr(module, "splits_of", lambda *_: splits)
    case = Case(KVFormat(1, head_dim, 8), 2, [300, 3, 70, 128], device, 1e-3)
    assert case.error() <= MOST_ERROR
    outs = [torch.full_like(case.query, torch.nan) for _ in range(2)]
    for out in outs:
        decode(case.query, case.cache, case.tables, case.offsets, None, None, out)
    assert torch.equal(*outs)


def test_the_real_head(device: torch.device) -> None:
    """Values alone, 512 numbers of which 64 pairs are turned."""
    case = Case(KVFormat(1, 512, 8, 64), 8, [33, 90], device, 1e-3, page=16)
    assert case.error() <= MOST_ERROR


def test_half_precision(device: torch.device, round_off: dict[torch.dtype, float]) -> None:
    case = Case(KVFormat(2, 64, 8), 2, [40, 1], device, 1.0)
    for dtype in (torch.bfloat16, torch.float16):
        case.query = case.query.to(dtype).float()
        pages = plan_pages(
            case.tables, case.offsets, None, queries=1, block_size=PAGE, dtype=torch.float32
        )
        case.cache.scales.nan_to_num_(0.0)
        case.cache.second.clamp_(max=0)
        case.wanted = attention(case.query[:, None], case.cache, pages)[:, 0]
        assert case.error(dtype) <= round_off[dtype] + MOST_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(24, 1), (64, 8), (128, 3)])
@pytest.mark.parametrize("window", [None, 20])
def test_plain(
    dtype: torch.dtype, head_dim: int, group: int, window: int | None, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter cannot multiply matrices of bfloat16")
    torch.manual_seed(0)
    keys, values = torch.randn(2, 30, PAGE, 2, head_dim, device=device).to(dtype)
    tables = torch.randperm(30, device=device)[:27].view(3, 9)
    offsets = torch.tensor([70, 0, 21], device=device)
    query = (torch.randn(3, 2 * group, head_dim, device=device) / head_dim**0.5).to(dtype)
    pages = plan_pages(tables, offsets, window, queries=1, block_size=PAGE, dtype=torch.float32)
    wanted = paged_attention(query[:, None].float(), keys.float(), values.float(), pages)[:, 0]
    for row, offset in enumerate(offsets.tolist()):
        first = 0 if window is None else max(0, offset - window + 1)
        unread = [
            *tables[row, : first // PAGE].tolist(),
            *tables[row, offset // PAGE + 1 :].tolist(),
        ]
        keys[unread], values[unread] = torch.nan, torch.nan
    out = torch.full_like(query, torch.nan)
    decode(query, (keys, values), tables.int(), offsets, window, None, out)
    # Probabilities are rounded to the dtype too.
    most = 5e-4 if dtype == torch.float16 else 4e-3
    assert float((out.double() - wanted).norm() / wanted.norm()) <= most


def test_rows_beyond_the_workspace(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_most_rows", lambda *_: 2)
    assert Case(KVFormat(1, 64, 8), 2, [40, 3, 17, 9, 1], device, 1.0).error() <= MOST_ERROR


WRONG: dict[str, Callable[[Case], dict[str, Any]]] = {
    "query is": lambda case: {"query": case.query.int()},
    "query has": lambda case: {"query": case.query[:, :3].contiguous()},
    "tables is": lambda case: {"tables": case.tables[:1]},
    "offsets is": lambda case: {"offsets": case.offsets.int()},
    "the window is": lambda case: {"window": 0},
    "out is": lambda case: {"out": case.query.half()},
    "by a rule": lambda case: {"rule": rule_of(64, 8, 9, case.query.device)},
    "must be contiguous": lambda case: {"tables": case.tables.T.contiguous().T},
    "both bfloat16": lambda case: {"cache": (torch.zeros(2, 8, 2, 64),) * 2},
    "alike": lambda case: {"cache": (torch.zeros(2, 8, 2, 64), torch.zeros(2, 8, 2, 32))},
}


@pytest.mark.parametrize("fault", WRONG)
def test_refuses_what_does_not_fit(fault: str, device: torch.device) -> None:
    case = Case(KVFormat(2, 64, 8), 2, [9, 17], device, 1.0)
    given: dict[str, Any] = {
        **{"query": case.query, "cache": case.cache, "tables": case.tables},
        **{"offsets": case.offsets, "window": None, "rule": None},
        "out": torch.empty_like(case.query),
    }
    with pytest.raises(KernelInputError, match=fault):
        decode(**{**given, **WRONG[fault](case)})


def test_refuses_a_rule_that_does_not_fit(device: torch.device) -> None:
    case = Case(KVFormat(1, 64, 8, 8), 2, [9], device, 1.0)
    assert case.rule is not None
    case.rule = replace(case.rule, weight=torch.ones(32, device=device))
    with pytest.raises(KernelInputError, match="rule must have"):
        case.error()


@pytest.mark.parametrize(
    ("form", "group", "name", "fits"),
    [
        (KVFormat(4, 512, 8, 64), 8, "sm_90", True),
        (KVFormat(16, 256, 8), 2, "sm_120", True),
        (KVFormat(4, 512, 8, 64), 9, "sm_90", False),
        (KVFormat(4, 512, 4, 64), 8, "sm_90", False),
        (KVFormat(4, 512, 8), 8, "sm_90", False),
        (KVFormat(4, 128, 8, 16), 8, "sm_90", False),
        (KVFormat(4, 512, 8, 64), 8, "gfx942", False),
    ],
)
def test_tensor_cores_take_what_fits_them(
    form: KVFormat, group: int, name: str, fits: bool
) -> None:
    target = next(each for each in ALL if each.name == name)
    assert (module._program(form, group, 16, True, target)[0] is decode_mma) is fits


def test_splits_fill_the_processors() -> None:
    assert splits_of(264, 32, 32768, 1000, 32) == 8
    assert splits_of(396, 32, 32768, 1000, 64) == 12
    assert splits_of(264, 512, 1024, 1000, 32) == 1
    assert splits_of(264, 4, 32768, 3, 32) == 3


def test_splits_are_whole_steps() -> None:
    """Of 1,024 steps 66 programs would have 16 at most, as 64 have."""
    assert splits_of(264, 4, 32768, 1000, 32) == 64
