"""One matrix compressed: the pattern is kept, errors fall, nothing depends on luck."""

import pytest
import torch
from torch import Tensor

from conclave.kernels.formats import Format
from conclave.kernels.integer.weights import is_whole
from conclave.kernels.layouts import mask_of, pack, unpack, validate
from conclave.worker.compress.pruning import MODES, Mode, compress, output_error, strongest
from conclave.worker.errors import ConfigError

FORMATS = ["5:16-int4-g64", "4:16-int4-g128", "8:16-int8-g64", "5:16-bf16", "dense-int4-g64"]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the moments of inputs that depend on each other, some far larger than others."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=draw)
    inputs = torch.randn(4 * columns, columns // 4, generator=draw) @ mixing
    inputs += torch.randn(inputs.shape, generator=draw)
    inputs *= torch.rand(columns, generator=draw) ** 2 * 4
    return torch.randn(rows, columns, generator=draw) * 0.02, inputs.T @ inputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", FORMATS)
def test_pattern_and_bytes_hold(text: str, mode: Mode) -> None:
    format = Format.parse(text)
    weight, moments = problem(72, 256)
    packed = compress(weight, moments, format, mode)
    validate(packed)
    assert bool((mask_of(packed).view(72, -1, 16).sum(-1) == format.kept).all())
    again = compress(weight, moments, format, mode)
    pairs = zip(packed.tensors().values(), again.tensors().values(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("text", FORMATS)
def test_the_more_a_mode_knows_the_less_it_harms(text: str) -> None:
    for seed in range(3):
        weight, moments = problem(64, 256, seed)
        format = Format.parse(text)
        magnitude, wanda, sparsegpt = (
            output_error(weight, unpack(compress(weight, moments, format, mode)), moments)
            for mode in MODES
        )
        assert sparsegpt < 0.8 * wanda
        assert wanda < magnitude or format.dense


@pytest.mark.parametrize("mode", MODES)
def test_whole_scales(mode: Mode) -> None:
    """They cost little, and formats of other bits stay as they are."""
    weight, moments = problem(64, 256)
    format = Format.parse("5:16-int4-g64")
    whole = compress(weight, moments, format, mode, whole=True)
    validate(whole)
    assert is_whole(whole)
    usual = compress(weight, moments, format, mode)
    off, least = (output_error(weight, unpack(own), moments) for own in (whole, usual))
    assert not is_whole(usual) and off < 1.1 * least
    other = Format.parse("8:16-int8-g64")
    same = (compress(weight, moments, other, mode, whole=choice) for choice in (True, False))
    assert torch.equal(*map(unpack, same))


def test_inputs_that_tell_nothing_leave_the_largest() -> None:
    """Independent inputs of one size: no column can make up for another."""
    weight, _ = problem(40, 128)
    for text in ("5:16-bf16", "8:16-bf16"):
        found = compress(weight, torch.eye(128), Format.parse(text), "sparsegpt")
        assert torch.equal(unpack(found), unpack(pack(weight, Format.parse(text))))


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_are_always_zero(mode: Mode) -> None:
    weight, moments = problem(16, 128)
    moments[:, ::3] = 0
    moments[::3] = 0
    packed = compress(weight, moments, Format.parse("5:16-int4-g64"), mode)
    assert bool(unpack(packed).isfinite().all())
    nothing = compress(weight, torch.zeros(128, 128), Format.parse("5:16-int4-g64"), mode)
    assert bool(unpack(nothing).isfinite().all())


def test_the_same_input_twice() -> None:
    """Moments of rank one."""
    weight, _ = problem(16, 64)
    moments = torch.full((64, 64), 1e4)
    for text in ("5:16-int4-g64", "5:16-bf16"):
        packed = compress(weight, moments, Format.parse(text), "sparsegpt")
        error = output_error(weight, unpack(packed), moments)
        assert error < 0.05


def test_overflow_is_refused() -> None:
    weight, moments = problem(16, 64)
    moments[3, 3] = torch.inf
    with pytest.raises(ConfigError, match="overflow"):
        compress(weight, moments, Format.parse("5:16-bf16"), "wanda")


def test_strongest_of_those_alike_are_the_first() -> None:
    chosen = strongest(torch.ones(2, 32), 3)
    assert chosen.nonzero()[:, 1].tolist() == [0, 1, 2, 16, 17, 18] * 2
