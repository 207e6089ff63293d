"""The benchmark of lossless codes compares before it times."""

import pytest
import torch

from benchmarks import lossless
from conclave.kernels.lossless.codes import code_of, encode


def test_small_weights_are_compared_and_told() -> None:
    figures = lossless.measure(dry=True)
    assert [row["format"] for row in figures["rows"]] == ["5:16-int4-g128", "bfloat16"]
    assert [round(row["of_plain"], 3) for row in figures["rows"]] == [0.825, 0.69]


def test_a_wrong_byte_is_found() -> None:
    tensor = lossless.weight(None, 128, 64, "cpu")
    code = code_of("plain", None, tuple(tensor.shape), torch.bfloat16)
    assert code is not None
    coded = encode(code, tensor)
    coded[5] ^= 1
    with pytest.raises(AssertionError):
        lossless.check(code, coded, tensor)
