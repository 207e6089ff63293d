"""Other projects' int4 kernels, where they are installed, on the same weight where they take it."""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from conclave.kernels.formats import Format
from conclave.kernels.layouts import pack, unpack

from .clock import copies_past_cache
from .contestants import GEMLITE, TORCHAO, Contestant
from .shapes import group_of

_MOST_ERROR = 3e-2
"""They round each decoded weight to 16 bits, and add partial sums in 16 bits."""


def gemlite(weight: Tensor) -> Iterator[Contestant]:
    """GemLite's A16Wn with the codes and scales of our dense int4, in bfloat16 and float16.

    Tuned as it comes: over its short list of configurations at each new number of tokens. Beyond
    one token, bfloat16 alone, as our own activations are.
    """
    helper = import_module("gemlite.helper")
    rows, columns = weight.shape
    group = group_of(columns)
    packed = pack(weight, Format.parse(f"dense-int4-g{group}"))
    assert packed.scales is not None
    scales = packed.scales.movedim(1, 2).reshape(-1, columns // group)[:rows]
    truth = unpack(packed)
    steps = truth.view(rows, -1, group) / scales.float()[..., None]
    codes = (steps.nan_to_num().round() + 8).to(torch.uint8).view(rows, columns)
    zeros = torch.full_like(scales, 8)
    nbytes = packed.codes.nbytes + 2 * packed.scales.nbytes
    count = copies_past_cache(nbytes)
    for dtype, most in ((torch.bfloat16, 256), (torch.float16, 1)):
        tool = helper.A16Wn(device=str(weight.device), dtype=dtype)
        layers = [tool.from_weights(codes, scales, zeros, 4, group) for _ in range(count)]
        yield Contestant(
            GEMLITE,
            str(dtype).removeprefix("torch."),
            nbytes,
            truth,
            count,
            _each(layers),
            dtype=dtype,
            most_error=_MOST_ERROR,
            tokens=(1, most),
        )


def torchao(weight: Tensor) -> Iterator[Contestant]:
    """torchao's int4 weights in tiles for tensor cores, which it quantizes itself.

    Its dense weight is what it makes of the unit matrix.
    """
    quantization = import_module("torchao.quantization")
    config = quantization.Int4WeightOnlyConfig(
        group_size=group_of(weight.shape[1]),
        int4_packing_format="tile_packed_to_4d",
        set_inductor_config=False,
    )

    def layer() -> torch.nn.Sequential:
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = torch.nn.Parameter(weight, requires_grad=False)
        model = torch.nn.Sequential(made)
        quantization.quantize_(model, config)
        return model

    first = layer()
    packed: Any = first[0].weight
    nbytes = packed.qdata.nbytes + packed.scale_and_zero.nbytes
    count = copies_past_cache(nbytes)
    layers = [first] + [layer() for _ in range(count - 1)]
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    yield Contestant(
        TORCHAO,
        "tile_packed_to_4d",
        nbytes,
        first(unit).T.contiguous(),
        count,
        _each(layers),
        most_error=_MOST_ERROR,
        tokens=(1, 256),
    )


def _each(layers: Sequence[torch.nn.Module]) -> Callable[[Tensor, int], Tensor]:
    def multiply(x: Tensor, copy: int) -> Tensor:
        product: Tensor = layers[copy](x)
        return product

    return multiply
