"""gelu(gate) * up of products that a vendor's library has written, where kernels of ours would have
joined them on the way.

In one pass, in float32: torch makes four of it, and two copies of float32.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .launching.launch import Kernel, Variant
from .workspace import gated

BLOCK, WARPS = 1024, 4


@triton.jit
def _let_through(out, pairs, width, scale, stride, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    both = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    own = tl.load(pairs + row * (2 * width) + both, mask=both < 2 * width, other=0.0)
    gate, up = tl.split(tl.reshape(own.to(tl.float32), [BLOCK, 2]))
    value = (gated(gate, up) * scale).to(out.dtype.element_ty)
    tl.store(out + row * stride + column, value, mask=column < width)


_kernel = Kernel(_let_through, grid="rows, cdiv(width, BLOCK)")


def variants() -> Iterator[Variant]:
    """What the bundle holds."""
    types = ("*bf16", "*bf16", "i32", "fp32", "i32")
    yield Variant(_kernel, types, {"BLOCK": BLOCK}, warps=WARPS)


def let_through(pairs: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """gelu_tanh(pairs[:, 2i]) * pairs[:, 2i + 1] * scale into `out` [T, R].

    `pairs` is [T, 2R] and contiguous; rows of `out` may lie apart. Both are on a card.
    """
    rows, width = out.shape
    grid = (rows, triton.cdiv(width, BLOCK))
    _kernel.launch(
        grid, out, pairs, width, scale, out.stride(0), constants={"BLOCK": BLOCK}, warps=WARPS
    )
