"""Keys and values written out of their pages: all formats, ends of pages, nothing beside them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conclave.kernels.attention import gather, reference
from conclave.kernels.attention.cache import NONE, KeyRule, KVFormat, NarrowCache, Overflow
from conclave.kernels.errors import KernelInputError

CPU = torch.device("cpu")
PAGES, PAGE, ROOM = 6, 4, 20
FORMATS = [
    KVFormat(2, 24, 8),
    KVFormat(1, 24, 4),
    KVFormat(1, 2, 8),
    KVFormat(2, 64, 8),
    KVFormat(2, 128, 8, 16),
    KVFormat(1, 24, 8, 3),
    KVFormat(1, 128, 4, 16),
    KVFormat(1, 64, 8, 0),
    KVFormat(1, 64, 8, 32),
    KVFormat(1, 512, 8, 64),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def named(format: KVFormat) -> str:
    return f"{format.kv_heads}x{format.head_dim}-int{format.bits}-{format.pairs}"


def filled(format: KVFormat, device: torch.device) -> tuple[NarrowCache, KeyRule | None]:
    """Pages full of tokens, of which about half have a second digit, and how keys are made."""
    tokens = PAGES * PAGE
    rule = None
    if format.pairs is not None:
        angles = torch.rand(tokens, format.pairs) * 7
        rule = KeyRule(torch.randn(format.head_dim).exp(), angles.cos(), angles.sin())
        rule = KeyRule(*(own.to(device) for own in (rule.weight, rule.cosines, rule.sines)))
    pool = Overflow.empty(format, tokens * format.kv_heads, device)
    cache = NarrowCache.empty(format, PAGES, PAGE, pool)
    key, value = torch.randn(2, tokens, format.kv_heads, format.head_dim, device=device)
    limits = (torch.arange(tokens, device=device) % 2).float()
    reference.store(
        None if rule else key,
        value,
        cache,
        torch.randperm(tokens).to(device),
        limits,
        torch.zeros(tokens, dtype=torch.bool, device=device),
        rule,
    )
    assert 0 < (cache.second == NONE).sum() < cache.second.numel()
    return cache, rule


def outputs(heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [
        torch.full((heads, ROOM, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(2)
    ]


def check(
    cache: NarrowCache | tuple[Tensor, Tensor],
    tables: Tensor,
    length: int,
    rule: KeyRule | None,
    own: list[Tensor],
    error: float,
) -> None:
    """What is written into `own` (key and value) has this relative error; the rest stays NaN."""
    gather.gather(cache, tables, length, rule, *own)
    true = [torch.full(out.shape, torch.nan, device=out.device) for out in own]
    reference.gather(cache, tables, length, rule, *true)
    for out, exact in zip(own, true, strict=True):
        assert torch.equal(out.isnan(), exact.isnan())
        assert out[:, length:].isnan().all() and out[:, :length].isfinite().all()
        lost = (out.float() - exact)[:, :length].norm()
        assert lost <= error * exact[:, :length].norm()


@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_reference_gathers_what_it_reads(format: KVFormat) -> None:
    cache, rule = filled(format, CPU)
    tables = torch.tensor([4, 0, 3])
    own = outputs(format.kv_heads, format.head_dim, torch.float32, CPU)
    reference.gather(cache, tables, 10, rule, *own)
    for out, exact in zip(own, reference.read(cache, tables[None], rule), strict=True):
        torch.testing.assert_close(out[:, :10], exact[0, :10].transpose(0, 1))
        assert out[:, 10:].isnan().all()


@pytest.mark.kernel
@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_gather_equals_its_reference(format: KVFormat, device: torch.device) -> None:
    cache, rule = filled(format, device)
    tables = torch.randperm(PAGES).to(device)
    for length in (1, 11, ROOM):
        own = outputs(format.kv_heads, format.head_dim, torch.float32, device)
        check(cache, tables, length, rule, own, 1e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gather_rounds_once(
    dtype: torch.dtype, device: torch.device, round_off: dict[torch.dtype, float]
) -> None:
    """Of a table that begins between addresses that kernels take."""
    format = KVFormat(2, 24, 8, 3)
    cache, rule = filled(format, device)
    tables = torch.randint(PAGES, (3, 3), device=device)
    for row in range(3):
        own = outputs(format.kv_heads, format.head_dim, dtype, device)
        check(cache, tables[row], 9, rule, own, round_off[dtype])
    own = outputs(format.kv_heads, format.head_dim, dtype, device)
    check(cache, tables[0, :0], 0, rule, own, 0.0)


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(2, 24), (1, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_copies_plain_caches(
    dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    """Rounded values are copied as they are, whatever dtype they go to."""
    cache = torch.randn(2, PAGES, PAGE, *shape, device=device).bfloat16().half().to(dtype)
    for length in (1, 14, ROOM):
        own = outputs(*shape, dtype if length == 14 else torch.float32, device)
        check((cache[0], cache[1]), torch.randperm(PAGES).to(device), length, None, own, 0.0)


def test_gather_refuses_what_does_not_fit() -> None:
    (cache, _), (made, rule) = filled(FORMATS[0], CPU), filled(KVFormat(2, 24, 8, 3), CPU)
    assert rule is not None
    plain = torch.zeros(PAGES, PAGE, 2, 24)
    key, value = outputs(2, 24, torch.bfloat16, CPU)
    good: dict[str, Any] = {
        **{"cache": cache, "tables": torch.arange(5), "length": 18},
        **{"rule": None, "out_key": key, "out_value": value},
    }
    wrong: list[dict[str, Any]] = [
        {"tables": torch.arange(5).int()},
        {"tables": torch.arange(5)[None]},
        {"tables": torch.arange(4)},
        {"tables": torch.arange(5, device="meta")},
        {"length": -1},
        {"length": ROOM + 1, "tables": torch.arange(6)},
        {"rule": rule},
        {"cache": made},
        {"cache": made, "rule": replace(rule, cosines=rule.cosines[:, :2])},
        {"cache": made, "rule": KeyRule(rule.weight, rule.cosines[:9], rule.sines[:9])},
        {"cache": replace(cache, codes=cache.codes.char())},
        {"cache": (plain, plain), "rule": rule},
        {"cache": (plain, plain.half())},
        {"cache": (plain, plain[:, :, :1])},
        {"cache": (plain.double(), plain.double())},
        {"cache": (plain[0], plain[0])},
        {"cache": (plain[..., :12], plain[..., :12])},
        {"out_key": key.half()},
        {"out_key": key[:, :19]},
        {"out_value": value[:1]},
        {"out_key": key.double(), "out_value": value.double()},
        {"out_value": value[0]},
    ]
    for change in wrong:
        with pytest.raises(KernelInputError, match="gathering keys and values: "):
            gather.gather(**good | change)
