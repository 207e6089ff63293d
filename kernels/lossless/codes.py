"""Weights in fewer bytes, exactly: which code shortens a tensor, coding it, decoding it.

| field       | of                     | code        | bits a survivor, or element          |
| ----------- | ---------------------- | ----------- | ------------------------------------ |
| `codes`     | N:16 int4, N is 2 to 8 | `ranks`     | (4 N + B) / N of 8: 6.6 at N = 5     |
| `positions` | N:16 int8, N:16 bf16   | `ranks`     | B / N of 4 (N even): 2.6 at N = 5    |
| `codes`     | N:16 bf16              | `exponents` | 11.03 of 16                          |
| `plain`     | a bfloat16 weight      | `exponents` | 11.03 of 16                          |

Nothing else has a code. Sizes follow from shapes, so that memory can be planned before weights are
read; of `exponents` the end may be without use, and `used` tells how much. Tensors are taken as
they lie in memory, without gaps.

`encode` runs once, when a model is loaded, in plain torch and bounded memory. `decode` runs before
each use: on a card it is one kernel, elsewhere plain torch. Its first call on a card for each code
loads a kernel, and a table for ranks, so that one call has to come before a CUDA graph records any.
"""

import torch
from torch import Tensor

from ..errors import KernelInputError
from ..formats import TILE, Format
from . import exponents, ranks, unrank
from .exponents import ExponentCode
from .ranks import MOST_KEPT, RankCode
from .restore import restore

Code = RankCode | ExponentCode
"""Frozen; `bytes` is the size of what is coded, `plain_bytes` that of what is decoded."""


def code_of(
    field: str, format: Format | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Code | None:
    """The code of a tensor, or None if none shortens it.

    Args:
        field: its name in `formats.tensor_shapes`, or "plain" of a plain weight.
        format: of the weight; None of a plain one.
        shape: of the tensor, with or without experts.
        dtype: of the tensor.
    """
    size = torch.Size(shape).numel()
    code: Code | None = None
    if dtype == torch.bfloat16 and field in ("plain", "codes"):
        code = ExponentCode(size)
    elif format is not None and format.kept <= MOST_KEPT:
        valued = field == "codes" and format.bits == 4
        if valued or field == "positions":
            slots = shape[-2]
            code = RankCode(format.kept, size // (slots * TILE), valued)
    return code if code is not None and code.bytes < size * dtype.itemsize else None


def encode(code: Code, tensor: Tensor) -> Tensor:
    """uint8 [code.bytes] on the tensor's device.

    CodeError if the tensor does not fit the code's room; KernelInputError if it is not contiguous
    or of another size than `code_of` was told.
    """
    _check("the tensor", tensor, code.plain_bytes)
    if isinstance(code, RankCode):
        return ranks.encode(code, tensor)
    return exponents.encode(code, tensor)


def decode(code: Code, coded: Tensor, out: Tensor) -> None:
    """The bytes that were encoded, uint8 [code.bytes], into `out`, whatever its shape and dtype.

    Both are contiguous and on the same device; on a card both begin at multiples of 16 bytes.
    KernelInputError if something does not fit; nothing was read then.
    """
    _check_coded(code, coded)
    _check("out", out, code.plain_bytes)
    if coded.device != out.device:
        raise KernelInputError(f"coded is on {coded.device}, out on {out.device}")
    plain = out.view(-1).view(torch.uint8)
    on_card = out.device.type == "cuda"
    if isinstance(code, RankCode):
        (unrank.unrank if on_card else ranks.decode)(code, coded, plain)
    else:
        (restore if on_card else exponents.decode)(code, coded, plain)


def used(code: Code, coded: Tensor) -> int:
    """How many of the bytes that `encode` gave `decode` needs: the first ones, a multiple of 16.

    Whatever lies behind them changes nothing. Waits for the device that they are on.
    """
    _check_coded(code, coded)
    return code.bytes if isinstance(code, RankCode) else exponents.used(code, coded)


def _check_coded(code: Code, coded: Tensor) -> None:
    _check("coded", coded, code.bytes)
    if coded.dtype != torch.uint8 or coded.dim() != 1:
        raise KernelInputError(
            f"coded is {coded.dtype} {tuple(coded.shape)}; it must be uint8 [{code.bytes}]"
        )


def _check(name: str, tensor: Tensor, size: int) -> None:
    if not tensor.is_contiguous() or tensor.nbytes != size:
        raise KernelInputError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be contiguous, {size} bytes"
        )
