"""Keys and values written in narrow numbers: how far off they are, and who has the pool's rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conclave.kernels.attention import reference, store
from conclave.kernels.attention.cache import (
    NONE,
    KeyRule,
    KVFormat,
    NarrowCache,
    Overflow,
    turned,
    turned_back,
)
from conclave.kernels.errors import KernelInputError, LayoutError

CPU = torch.device("cpu")
PAGES, PAGE = 6, 4
FORMATS = [
    KVFormat(2, 24, 8),
    KVFormat(1, 24, 4),
    KVFormat(1, 2, 8),
    KVFormat(2, 64, 8),
    KVFormat(1, 64, 4),
    KVFormat(2, 128, 8, 16),
    KVFormat(1, 24, 8, 3),
    KVFormat(1, 128, 4, 16),
    KVFormat(1, 64, 8, 0),
]
LONG = [KVFormat(1, 256, 8), KVFormat(1, 512, 8, 64)]
LEAVING = [KVFormat(2, 24, 8), KVFormat(3, 64, 4), KVFormat(2, 128, 8, 16)]
MISSING = [[0], [7], [3, 0, 7, 4], list(range(8))]
"""Which of eight tokens have no slot."""


def named(format: KVFormat) -> str:
    return f"{format.kv_heads}x{format.head_dim}-int{format.bits}-{format.pairs}"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def limit_of(format: KVFormat) -> float:
    """That some heads meet with one digit, and all with two."""
    return 0.01 if format.bits == 8 else 0.1


def rule_of(format: KVFormat, device: torch.device = CPU) -> KeyRule | None:
    if format.pairs is None:
        return None
    angles = torch.rand(PAGES * PAGE, format.pairs) * 7
    weight = torch.randn(format.head_dim).exp()
    return KeyRule(weight.to(device), angles.cos().to(device), angles.sin().to(device))


def tokens_of(format: KVFormat) -> Tensor:
    """float32 [8, kv_heads, head_dim]: common, outlying and empty vectors."""
    tokens = torch.randn(8, format.kv_heads, format.head_dim)
    tokens[1] = 0
    tokens[2] = 0
    tokens[2, :, 1] = -3
    tokens[3] = tokens[3] ** 5
    tokens[4] *= 1e-6
    tokens[5, 0] *= 1e4
    return tokens


class Written:
    """A cache of `rows` rows of the pool into which tokens are written by `module`."""

    def __init__(self, module: Any, format: KVFormat, rows: int, device: torch.device = CPU):
        self.module, self.format, self.device = module, format, device
        self.cache = NarrowCache.empty(format, PAGES, PAGE, Overflow.empty(format, rows, device))

    def store(
        self, key: Tensor, value: Tensor, slots: Tensor, limits: Tensor, rule: KeyRule | None
    ) -> Tensor:
        failed = torch.zeros(len(value), dtype=torch.bool, device=self.device)
        inputs = (value, self.cache, slots, limits, failed, rule)
        self.module.store(key if rule is None else None, *inputs)
        return failed

    def read(self, slots: Tensor, rule: KeyRule | None) -> tuple[Tensor, Tensor]:
        """float32 [T, kv_heads, head_dim]"""
        tables = torch.arange(PAGES, device=self.device)[None]
        key, value = reference.read(self.cache, tables, rule)
        return key[0, slots], value[0, slots]

    def held(self) -> Tensor:
        rows = self.cache.second[self.cache.second != NONE]
        pool = self.cache.overflow
        everyone = torch.cat((pool.free[: int(pool.count)], rows)).sort().values
        assert everyone.tolist() == list(range(len(pool.free))), "a row was lost or has two owners"
        return rows


def errors_of(
    written: Written, key: Tensor, value: Tensor, slots: Tensor, rule: KeyRule | None
) -> Tensor:
    """Relative errors [T, kv_heads] of what is read, the larger of key's and value's."""
    if rule is not None:
        key = reference.made_keys(value, rule, slots)
    errors = []
    for exact, own in zip((key, value), written.read(slots, rule), strict=True):
        lost, size = (each.double().norm(dim=-1) for each in (own.double() - exact, exact))
        errors.append(torch.where(lost > 0, lost / size, 0.0 * lost))
    return torch.maximum(*errors)


@pytest.mark.parametrize("format", FORMATS + LONG, ids=named)
def test_no_error_is_above_its_limit(format: KVFormat) -> None:
    rule = rule_of(format)
    key, value = tokens_of(format), tokens_of(format).flip(0)
    slots = torch.randperm(PAGES * PAGE)[:8]
    written = Written(reference, format, 64)
    for limit in (1.0, limit_of(format), 0.0):
        failed = written.store(key, value, slots, torch.full((8,), limit), rule)
        errors = errors_of(written, key, value, slots, rule)
        rounding = 2e-6
        if limit > 0:
            assert not failed.any() and errors.max() <= limit + rounding
        elif rule is None:
            # Two digits have an error that the format alone tells; a weighted key can have more.
            assert errors.max() <= format.worst + rounding
        assert limit < 1 or (written.cache.second == NONE).all()
        if limit == 0:
            zero = (value == 0).all(-1) & ((key == 0).all(-1) | (rule is not None))
            page, place = slots // PAGE, slots % PAGE
            assert torch.equal(written.cache.second[page, :, place] == NONE, zero)
        reference.release(written.cache.second[None], written.cache.overflow, torch.arange(PAGES))
        assert not len(written.held())
    assert written.cache.tally[0] == 3 * 8 * format.kv_heads


def test_second_digits_are_only_for_heads_that_need_them() -> None:
    format = KVFormat(2, 64, 8)
    value = torch.ones(3, 2, 64)
    value[1, 1] = torch.randn(64) ** 9
    value[1, 1, :8] = 1e5 * torch.arange(8)
    written = Written(reference, format, 8)
    slots, limits = torch.arange(3), torch.tensor([0.005, 0.002, 0.005])
    assert not written.store(value, value, slots, limits, None).any()
    assert (written.cache.second != NONE).nonzero().tolist() == [[0, 1, 1]]
    assert written.cache.tally.tolist() == [6, 1]


def test_the_pool_runs_out_and_fills_again() -> None:
    check_exhaustion(reference, CPU)


def check_exhaustion(module: Any, device: torch.device) -> None:
    """Five of eight heads get no row; their tokens are marked, and no other; then all come back."""
    format = KVFormat(2, 24, 8)
    value = torch.randn(4, 2, 24).to(device)
    written = Written(module, format, 3, device)
    slots = torch.tensor([5, 4, 9, 0], device=device)
    limits = torch.full((4,), 1e-4, device=device)
    failed = written.store(value, value, slots, limits, None)
    assert int(written.cache.overflow.count) == 0 and len(written.held()) == 3
    has = written.cache.second[slots // PAGE, :, slots % PAGE] != NONE
    assert torch.equal(failed, ~has.all(1)) and has.sum() == 3
    assert written.cache.tally.tolist() == [8, 3]
    module.release(
        written.cache.second[None], written.cache.overflow, torch.tensor([3, 5]).to(device)
    )
    assert len(written.held()) == 3, "pages that hold nothing have nothing to give"
    module.release(
        written.cache.second[None], written.cache.overflow, torch.tensor([1, 2, 0]).to(device)
    )
    assert not len(written.held()) and int(written.cache.overflow.count) == 3


@pytest.mark.parametrize("missing", MISSING, ids=str)
@pytest.mark.parametrize("format", LEAVING, ids=named)
def test_nothing_is_stored_without_a_slot(format: KVFormat, missing: list[int]) -> None:
    check_left_out(reference, format, missing, CPU)


def check_left_out(module: Any, format: KVFormat, missing: list[int], device: torch.device) -> None:
    """As if the missing tokens were not there, though the pool has rows for the others alone.

    The first of them would take some; the others hold NaN, which would be marked.
    """
    rule = rule_of(format, device)
    key, value = (torch.randn(8, format.kv_heads, format.head_dim) for _ in range(2))
    key[missing[1:]] = value[missing[1:]] = torch.nan
    key, value = key.to(device), value.to(device)
    kept = torch.tensor([row for row in range(8) if row not in missing], device=device).long()
    slots = torch.randperm(PAGES * PAGE)[:8].to(device)
    limits = torch.full((8,), limit_of(format) / 50, device=device)
    wanted = len(kept) * format.kv_heads
    ours, true = (Written(module, format, max(wanted, 1), device) for _ in range(2))
    for written in (ours, true):
        written.cache.codes.fill_(77)
    expected = true.store(key[kept], value[kept], slots[kept], limits[kept], rule)
    assert len(true.held()) == wanted
    given = slots.clone()
    given[missing] = -1 - slots[missing] * 2**33
    failed = ours.store(key, value, given, limits, rule)
    assert torch.equal(failed[kept], expected) and not failed[missing].any()
    assert len(ours.held()) == wanted
    assert torch.equal(ours.cache.second == NONE, true.cache.second == NONE)
    for name in ("codes", "scales", "tally", "largest"):
        assert torch.equal(getattr(ours.cache, name), getattr(true.cache, name)), name
    for own, same in zip(ours.read(slots, rule), true.read(slots, rule), strict=True):
        assert torch.equal(own, same)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_is_marked_and_read_as_none(wrong: float) -> None:
    format = KVFormat(1, 24, 8)
    value = torch.randn(3, 1, 24)
    value[1, 0, 20] = wrong
    written = Written(reference, format, 8)
    failed = written.store(
        torch.ones(3, 1, 24), value, torch.arange(3), torch.full((3,), 0.02), None
    )
    assert failed.tolist() == [False, True, False]
    key, read = written.read(torch.arange(3), None)
    assert key.isfinite().all() and read[[0, 2]].isfinite().all() and read[1].isnan().all()
    assert written.cache.largest < 0.02


@pytest.mark.parametrize("format", FORMATS + LONG, ids=named)
def test_formats_count_their_bytes_and_turn_back(format: KVFormat) -> None:
    cache = Written(reference, format, 8).cache
    pool = cache.overflow
    bytes_held = sum(own.nbytes for own in (cache.codes, cache.scales, cache.second))
    assert bytes_held == PAGES * PAGE * format.token_bytes
    assert pool.codes.nbytes + pool.scales.nbytes == len(pool.free) * format.row_bytes
    vectors = tokens_of(format)
    stored = turned(vectors, format)
    torch.testing.assert_close(turned_back(stored, format), vectors, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(stored.norm(dim=-1), vectors.norm(dim=-1))
    order = format.order()
    assert order is None or order.sort().values.tolist() == list(range(format.head_dim))


def test_formats_that_cannot_be() -> None:
    for wrong in ((1, 24, 6), (1, 23, 8), (0, 24, 8), (1, 24, 8, 13)):
        with pytest.raises(LayoutError):
            KVFormat(*wrong)


@pytest.mark.kernel
@pytest.mark.parametrize("format", [*FORMATS, LONG[1]], ids=named)
def test_store_equals_its_reference(format: KVFormat, device: torch.device) -> None:
    """Codes but for a few at an edge of rounding, all decisions, and all that is counted."""
    rule = rule_of(format, device)
    key, value = (tokens_of(format).bfloat16().to(device) for _ in range(2))
    key[6, -1, 1] = value[6, -1, -1] = torch.nan
    value[7, -1, 1] = torch.inf
    slots = torch.randperm(PAGES * PAGE)[:8].to(device)
    limits = torch.full((8,), limit_of(format), device=device)
    limits[0], limits[3] = 1e-9, 1.0
    ours, true = (Written(module, format, 32, device) for module in (store, reference))
    ours.cache.codes.fill_(77)
    failed, expected = (own.store(key, value, slots, limits, rule) for own in (ours, true))
    assert failed.tolist() == expected.tolist()
    assert torch.equal(ours.cache.second == NONE, true.cache.second == NONE)
    assert len(ours.held()) == len(true.held()) > 0
    assert ours.cache.tally.tolist() == true.cache.tally.tolist()
    torch.testing.assert_close(ours.cache.largest, true.cache.largest, rtol=1e-3, atol=0)

    page, place = slots // PAGE, slots % PAGE
    finite = true.cache.scales[page, :, :, place].isfinite()
    assert torch.equal(
        ours.cache.scales[page, :, :, place][finite], true.cache.scales[page, :, :, place][finite]
    )
    codes = [
        reference._unpacked(own.cache.codes[page, :, :, place][finite], format)
        for own in (ours, true)
    ]
    apart = (codes[0] - codes[1]).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 4
    others = torch.ones(PAGES, PAGE, dtype=torch.bool, device=device)
    others[page, place] = False
    assert (ours.cache.codes.movedim(3, 1)[others] == 77).all(), "written beside its slots"
    for own, same in zip(ours.read(slots, rule), true.read(slots, rule), strict=True):
        assert torch.equal(own.isnan(), same.isnan())
        apart = (own - same).nan_to_num().norm(dim=-1) / same.nan_to_num().norm(dim=-1).clamp(1e-30)
        assert apart.max() <= limit_of(format) / 2


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_store_takes_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    format = KVFormat(1, 24, 8)
    value = torch.randn(2, 1, 24).to(device, dtype)
    written = Written(store, format, 4, device)
    slots, limits = torch.tensor([3, 8], device=device), torch.full((2,), 1e-3, device=device)
    assert not written.store(2 * value, value, slots, limits, None).any()
    assert errors_of(written, 2 * value, value, slots, None).max() <= 1e-3
    nothing = torch.empty(0, 1, 24, dtype=dtype, device=device)
    written.store(nothing, nothing, slots[:0], limits[:0], None)
    assert written.cache.tally.tolist() == [2, 2]


@pytest.mark.kernel
@pytest.mark.parametrize("missing", MISSING, ids=str)
@pytest.mark.parametrize("format", LEAVING, ids=named)
def test_kernels_store_nothing_without_a_slot(
    format: KVFormat, missing: list[int], device: torch.device
) -> None:
    check_left_out(store, format, missing, device)


@pytest.mark.kernel
def test_the_pool_of_kernels_runs_out_and_fills_again(device: torch.device) -> None:
    check_exhaustion(store, device)


@pytest.mark.kernel
def test_release_gives_back_for_all_layers(device: torch.device) -> None:
    """Pages with more places than are looked at together; other pages keep what they have."""
    overflow = Overflow.empty(KVFormat(3, 24, 8), 1600, device)
    second = torch.full((2, 3, 3, 100), NONE, dtype=torch.int32, device=device)
    taken = torch.randperm(1600, device=device)[:900].int()
    left = torch.ones(1600, dtype=torch.bool, device=device)
    left[taken.long()] = False
    overflow.free[:700] = left.nonzero().flatten().int()
    overflow.count.fill_(700)
    second.view(-1)[torch.randperm(1800, device=device)[:900]] = taken
    kept = second[:, 1].clone()
    store.release(second, overflow, torch.tensor([2, 0], device=device))
    assert torch.equal(second[:, 1], kept) and (second[:, [0, 2]] == NONE).all()
    free = overflow.free[: int(overflow.count)]
    everyone = torch.cat((free, kept[kept != NONE])).sort().values
    assert torch.equal(everyone, torch.arange(1600, device=device).int())


def test_store_refuses_what_does_not_fit() -> None:
    format, made = KVFormat(1, 24, 8), KVFormat(1, 24, 8, 3)
    cache, values = (Written(store, each, 4).cache for each in (format, made))
    x, rule = torch.zeros(2, 1, 24), rule_of(made)
    assert rule is not None
    slots, limits, failed = torch.arange(2), torch.ones(2), torch.zeros(2, dtype=torch.bool)
    good: dict[str, Any] = {
        **{"key": x, "value": x, "cache": cache, "slots": slots},
        **{"limits": limits, "failed": failed, "rule": None},
    }
    wrong: list[dict[str, Any]] = [
        {"value": x.double()},
        {"value": x[:, :, :12]},
        {"value": torch.zeros(2, 1, 48)[..., ::2]},
        {"key": x.half()},
        {"key": None},
        {"slots": slots.int()},
        {"slots": slots[:1]},
        {"limits": limits.double()},
        {"failed": failed.byte()},
        {"rule": rule},
        {"cache": values},
        {"cache": values, "rule": rule},
        {"cache": values, "key": None},
        {"cache": values, "key": None, "rule": replace(rule, weight=rule.weight.bfloat16())},
        {"cache": replace(cache, scales=cache.scales.float())},
        {"cache": replace(cache, codes=cache.codes[..., :12])},
        {"cache": replace(cache, overflow=Written(store, made, 4).cache.overflow)},
        {"cache": replace(cache, second=cache.second[0])},
        {"slots": slots.to("meta")},
    ]
    for change in wrong:
        with pytest.raises(KernelInputError, match="storing keys and values: "):
            store.store(**good | change)


def test_release_refuses_what_does_not_fit() -> None:
    cache = Written(store, KVFormat(1, 24, 8), 4).cache
    pages, pool = torch.arange(2), cache.overflow
    for second, overflow, given in (
        (cache.second, pool, pages),
        (cache.second[None].long(), pool, pages),
        (cache.second[None], pool, pages.int()),
        (cache.second[None], pool, pages[None]),
        (cache.second[None], replace(pool, free=pool.free[:2]), pages),
        (cache.second[None], replace(pool, count=pool.count.long()), pages),
    ):
        with pytest.raises(KernelInputError, match="giving rows back: "):
            store.release(second, overflow, given)
