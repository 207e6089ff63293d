"""Products on tensor cores: activations beside tiny weights; on a card every way to share work."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from conclave.kernels.formats import Format, PackedWeight
from conclave.kernels.launching.launch import Kernel
from conclave.kernels.layouts import pack, unpack
from conclave.kernels.tensor_cores import decode
from conclave.kernels.tensor_cores import matmul as module
from conclave.kernels.tensor_cores.matmul import Staged, matmul

from . import emulated_ptx

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
KINDS = ("plain", "residual", "gated")
FORMATS = (
    *("5:16-int4-g128", "5:16-int4-g64", "4:16-int4-g64", "6:16-int4-g128", "8:16-int4-g128"),
    *("dense-int4-g128", "dense-int4-g64", "dense-int8-g128", "dense-int8-g64"),
)


@pytest.fixture(autouse=True)
def the_same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.mark.kernel
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("group", [0, 64, 128])
def test_activations_are_interleaved(group: int, together: bool, device: torch.device) -> None:
    """With the sums of their groups if weights are tiny."""
    tokens, columns, lines = 5, 384, 9
    x = torch.randn(tokens, columns).bfloat16().to(device)
    out = torch.zeros(columns // 64, lines, 64, dtype=torch.bfloat16, device=device)
    sums = torch.zeros(columns // (group or 64), lines, 16, dtype=torch.bfloat16, device=device)
    kernel = Kernel(decode.interleave, name="here", multiples_of_16=("count", "columns"))
    kernel.launch(
        (2,),
        *(out, sums, x, x.numel(), columns, lines),
        constants={"TOGETHER": together, "GROUP": group, "BLOCK": 1024, "OVERLAP": False},
    )
    # From token, step, group, half, i, e, f.
    parts = x.view(tokens, columns // 64, 4, 2, 2, 2, 2)
    if group:
        parts = parts * torch.tensor([2.0**80, 2.0**76], device=device)[:, None].bfloat16()
    parts = parts.permute(1, 0, 3, 4, 5, 2, 6).reshape(-1, tokens, 64)
    if together:
        assert torch.equal(out[:, :tokens], parts) and not out[:, tokens:].any()
    else:
        assert torch.equal(out.flatten()[: x.numel()].view(tokens, -1, 64), parts.transpose(0, 1))
    if group:
        exact = x.double().view(tokens, -1, group).sum(2).T * 2.0**-53
        error = sums[:, :tokens].double().sum(2) - exact
        assert error.abs().max() <= 2.0**-20 * exact.abs().max()
    assert not sums[:, tokens:].any() and not sums[..., 3:].any()


@pytest.mark.parametrize("biased", [False, True])
def test_tiny_numbers_stand_for_values(biased: bool) -> None:
    """Of eight nibbles the pairs 16 bits apart, those at odd places sixteen times too large."""
    nibbles = np.random.default_rng(0).integers(16, size=(32, 8), dtype=np.uint32)
    words = (nibbles << 4 * np.arange(8, dtype=np.uint32)).sum(1, dtype=np.uint32)
    text = (decode._TINY_BIASED if biased else decode._TINY).value
    pairs = emulated_ptx.run(text, decode.WIDEN_REGISTERS.value, [words] * 8)
    values = nibbles.astype(np.int64) if biased else (nibbles.astype(np.int64) + 8) % 16
    for place, pair in enumerate(pairs):
        for half in range(2):
            bits = pair.view(np.uint32) >> np.uint32(16 * half) & np.uint32(0xFFFF)
            tiny = (bits << np.uint32(16)).view(np.float32).astype(np.float64)
            assert (tiny * 2.0**133 == values[:, place + 4 * half] * 16 ** (place % 2)).all()


def product(
    weight: PackedWeight, x: torch.Tensor, kind: str, repeats: int = 3
) -> tuple[float, float]:
    """The error against float64, and what it may be; memory poisoned before, the same bits again.

    While it is made again others keep the processors busy, so that programs meet in another way.
    """
    exact = x.double() @ unpack(weight).double().T
    residual, scale = None, 1.0
    if kind == "residual":
        residual, scale = torch.randn_like(exact).bfloat16(), 0.5
        exact = (exact + residual) * scale
    elif kind == "gated":
        gate = torch.nn.functional.gelu(exact[:, ::2], approximate="tanh")
        exact = gate * exact[:, 1::2]
    torch.full((1 << 22,), torch.nan, device="cuda")
    stream, busy = torch.cuda.Stream(), torch.ones(1 << 24, device="cuda")
    made = []
    for turn in range(repeats):
        if turn % 2:
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                for _ in range(4):
                    busy.mul_(1.0)
        made.append(torch.full(exact.shape, torch.nan, dtype=torch.bfloat16, device="cuda"))
        matmul(x, weight, made[-1], residual, scale, gated=kind == "gated")
    torch.cuda.synchronize()
    assert all(torch.equal(each.view(torch.int16), made[0].view(torch.int16)) for each in made)
    error = float((made[0].double() - exact).norm() / exact.norm())
    return error, 5e-3 if kind == "gated" else 3e-3


def random_weight(text: str, rows: int, columns: int) -> PackedWeight:
    return pack(torch.randn(rows, columns, device="cuda"), Format.parse(text))


def activations(tokens: int, columns: int) -> torch.Tensor:
    """One column is much larger than the others, as of models."""
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    x[:, 3] *= 200
    return x


@on_card
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(80, 128), (130, 2176), (408, 896), (1408, 5376)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_and_awkward_shapes(text: str, rows: int, columns: int, kind: str) -> None:
    weight = random_weight(text, rows, columns)
    for tokens in (5, 8, 9, 16, 17, 33, 64, 65, 127, 128, 129, 192, 193, 200, 255, 256):
        error, most = product(weight, activations(tokens, columns), kind)
        assert error <= most, tokens


@on_card
@pytest.mark.parametrize("tokens", [7, 65, 100, 255])
def test_odd_rows(tokens: int) -> None:
    error, most = product(
        random_weight("5:16-int4-g64", 201, 704), activations(tokens, 704), "plain"
    )
    assert error <= most


@on_card
@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128, 192, 256, 300, 512])
@pytest.mark.parametrize("text", ["5:16-int4-g128", "dense-int4-g128"])
@pytest.mark.parametrize(("rows", "columns"), [(21504, 5376), (5376, 21504), (42, 21504)])
def test_as_models_have_them(text: str, rows: int, columns: int, tokens: int) -> None:
    error, most = product(random_weight(text, rows, columns), activations(tokens, columns), "plain")
    assert error <= most


@on_card
@pytest.mark.parametrize("text", ["5:16-int4-g128", "dense-int4-g128", "5:16-int4-g64"])
@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
def test_any_number_of_splits(text: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs have one group of columns, or none."""
    weight, x = random_weight(text, 384, 1408), activations(tokens, 1408)
    for splits in (1, 2, 3, 4, 5, 7, 11):
        asked: Callable[..., int] = lambda *_, own=splits: own  # noqa: E731
        monkeypatch.setattr(module, "matmul_splits", asked)
        error, most = product(weight, x, "residual")
        assert error <= most, splits


@on_card
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_both_ways_to_share_tiles(even: bool, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in module.STAGED:
        monkeypatch.setitem(module.STAGED, tokens, Staged(each, even))
        for text in ("5:16-int4-g128", "6:16-int4-g64"):
            weight = random_weight(text, 1408, 1408)
            for kind in KINDS:
                error, most = product(weight, activations(tokens - 1, 1408), kind)
                assert error <= most, (tokens, text, kind)


@on_card
@pytest.mark.parametrize("each", [1, 2, 3, 17, 400])
@pytest.mark.parametrize("tokens", [32, 64])
def test_any_number_of_staged_programs(
    each: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some have parts of three tiles, some tiles parts of many programs."""

    def asked(_: torch.device, tiles: int, chunks: int, *__: int) -> int:
        return min(each, tiles * chunks)

    monkeypatch.setattr(module, "persistent_programs", asked)
    weight = random_weight("5:16-int4-g128", 1000, 1536)
    error, most = product(weight, activations(tokens, 1536), "residual", repeats=5)
    assert error <= most


@on_card
@pytest.mark.parametrize("programs", [1, 2, 3, 66, 131, 132])
@pytest.mark.parametrize("tokens", [100, 192, 256])
def test_any_number_of_programs(
    programs: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some have parts of three tiles, some tiles parts of many programs."""

    def asked(_: torch.device, tiles: int, chunks: int, blocks: int, __: int) -> int:
        return min(programs, tiles * chunks)

    monkeypatch.setattr(module, "persistent_programs", asked)
    weight = random_weight("5:16-int4-g128", 1000, 1536)
    error, most = product(weight, activations(tokens, 1536), "plain", repeats=5)
    assert error <= most


@on_card
@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e6, 1e10])
@pytest.mark.parametrize("tokens", [5, 12, 64, 200])
def test_activations_of_any_size(size: float, tokens: int) -> None:
    """Tiny weights take activations times 2^80."""
    weight = random_weight("5:16-int4-g128", 640, 2048)
    x = (torch.randn(tokens, 2048, device="cuda") * size).bfloat16()
    error, most = product(weight, x, "plain")
    assert error <= most


@on_card
def test_infinite_activations_spoil_their_own_token_alone() -> None:
    weight = random_weight("5:16-int4-g128", 640, 2048)
    x = torch.randn(12, 2048, device="cuda", dtype=torch.bfloat16)
    x[5, 7] = torch.inf
    out = torch.zeros(12, 640, device="cuda", dtype=torch.bfloat16)
    matmul(x, weight, out)
    finite = out.isfinite().all(1)
    assert not finite[5] and int(finite.sum()) == 11
