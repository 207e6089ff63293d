"""Linear layers of packed weights: the ops that models call, and which kernel does it.

| tokens       | N:16 int4, groups of 64 or 128               | dense int4 and int8     | others |
| ------------ | -------------------------------------------- | ----------------------- | ------ |
| 1 to 4       | `sparse_gemv` (NVIDIA), else `sparse_gather` | `dense_gemv`            | expand |
| 5 to `MANY`  | `matmul` (NVIDIA, bfloat16), else expand     | the same, groups of 64+ | expand |
| more         | expand                                       | expand                  | expand |

Given a `max_error`, 4-bit weights with whole scales are multiplied as integers on Hopper
(`integer.multiply`), which pays from some hundred tokens on.

Expanding writes the dense weight, or a bounded number of its rows at a time, into scratch memory
that all layers share, and leaves the product to the vendor's library. On a CPU the reference runs.
`linear`, `gated_linear`, `grouped_linear` are torch custom ops: they work on fake tensors, in
`torch.compile` and, once called, in CUDA graphs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dense_gemv as dense
from . import reference
from . import sparse_gather as sparse
from .errors import KernelInputError
from .expand import expand
from .formats import TILE, Format, PackedWeight, from_tensors
from .gate import let_through
from .integer.digits import LEAST_ERROR
from .integer.multiply import multiply, on_hopper, supports
from .integer.reference import rounded
from .scratch import MOST_EXPANDED, scratch
from .sparse_gemv import sparse_gemv
from .tensor_cores import decode
from .tensor_cores.grouping import MOST_TOKENS
from .tensor_cores.matmul import matmul

MANY = 256
"""Tokens above which decoding for every 128 of them costs more than expanding once (an H100)."""
MOST_COPIES = 1 << 15
"""Tokens that read a weight each, in one launch: a card's grid has room for 65,535. Of a power of
two, parts of any width begin at multiples of 16 bytes."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear(
    x: Tensor,
    weight: PackedWeight,
    residual: Tensor | None = None,
    scale: float = 1.0,
    max_error: float | None = None,
) -> Tensor:
    """(x weight^T + residual) * scale, from [..., K] to [..., R], in the dtype of `x`.

    As `reference.linear`, on the device of `x`. With a `max_error` the weight's scales are whole
    (`integer.weights.is_whole`; not checked), and each row of `x` may be seen that far off,
    ||x - seen|| / ||x||; a CPU then rounds it as a Hopper card does. Raises `KernelInputError` if
    something does not fit.
    """
    _check(x, weight, residual, False, max_error)
    result: Tensor = torch.ops.conclave.linear(
        x, *_fields(weight), residual, scale, False, max_error
    )
    return result


def gated_linear(x: Tensor, weight: PackedWeight, max_error: float | None = None) -> Tensor:
    """gelu_tanh(gate) * up, from [..., K] to [..., R/2]: rows 2i and 2i + 1 are gate's and up's.

    As `reference.gated_linear`; `max_error` as of `linear`. Raises `KernelInputError` if something
    does not fit.
    """
    _check(x, weight, None, True, max_error)
    result: Tensor = torch.ops.conclave.linear(x, *_fields(weight), None, 1.0, True, max_error)
    return result


def grouped_linear(
    x: Tensor, weight: PackedWeight, experts: Tensor, gated: bool = False, among: int = 0
) -> Tensor:
    """[T, K] to [T, R], token t by the weight `experts[t]` (int32 [T]) of the stack.

    As `reference.grouped_linear`. Up to as many tokens as there are experts, the one with its eight
    above all, each reads its expert's weight; of more, those of an expert share it. For that, equal
    ones lie side by side, in any order; this is not checked on a card, where it would have to be
    waited for: what does not is left unwritten.

    `among` is how many experts there are to choose from, where the stack holds more: slots that
    several layers share. The results are then, bit for bit, those of a stack of so many.
    Raises `KernelInputError` if something else does not fit.
    """
    _check(x, weight, None, gated)
    if x.dim() != 2 or experts.shape != x.shape[:1] or experts.dtype != torch.int32:
        raise KernelInputError(
            f"x is {tuple(x.shape)} and experts {experts.dtype} {tuple(experts.shape)}; "
            "they must be [T, K] and int32 [T]"
        )
    if weight.experts is None:
        raise KernelInputError("the weight is a single one; grouped_linear takes a stack")
    if experts.device != weight.device:
        raise KernelInputError(f"experts is on {experts.device}, the weight on {weight.device}")
    if not 0 <= among <= weight.experts:
        raise KernelInputError(f"among is {among}; the stack holds {weight.experts}")
    result: Tensor = torch.ops.conclave.grouped_linear(x, *_fields(weight), experts, gated, among)
    return result


def _fields(weight: PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None, str, int]:
    """The weight as torch's ops can take it."""
    return weight.codes, weight.positions, weight.scales, str(weight.format), weight.rows


def _check(
    x: Tensor,
    weight: PackedWeight,
    residual: Tensor | None,
    gated: bool,
    max_error: float | None = None,
) -> None:
    if max_error is not None and not max_error >= LEAST_ERROR:
        raise KernelInputError(f"max_error is {max_error}; it must be {LEAST_ERROR} at least")
    if not x.dim() or x.shape[-1] != weight.columns:
        raise KernelInputError(f"x is {tuple(x.shape)}; the weight has {weight.columns} columns")
    if gated and weight.rows % 2:
        raise KernelInputError(f"{weight.rows} rows are no pairs of gate and up")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and tensor.device != weight.device:
            raise KernelInputError(f"{name} is on {tensor.device}, the weight on {weight.device}")
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise KernelInputError(f"{name} is {tensor.dtype}; it must be one of {_DTYPES}")
    wanted = (*x.shape[:-1], weight.rows)
    if residual is not None and tuple(residual.shape) != wanted:
        raise KernelInputError(f"the residual is {tuple(residual.shape)}; it must be {wanted}")


@torch.library.custom_op("conclave::linear", mutates_args=())
def _linear(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    residual: Tensor | None,
    scale: float,
    gated: bool,
    max_error: float | None,
) -> Tensor:
    weight = PackedWeight(Format.parse(format), rows, x.shape[-1], codes, positions, scales)
    if x.device.type != "cuda":
        seen = x if max_error is None else rounded(x, max_error)
        if gated:
            return reference.gated_linear(seen, weight).to(x.dtype)
        return reference.linear(seen, weight, residual, scale).to(x.dtype)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    added = None if residual is None else residual.reshape(-1, rows).contiguous().to(x.dtype)
    out = torch.empty(len(flat), rows // 2 if gated else rows, dtype=x.dtype, device=x.device)
    if len(flat):
        _multiply(flat, weight, out, added, scale, gated, max_error)
    return out.view(*x.shape[:-1], out.shape[1])


@_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    residual: Tensor | None,
    scale: float,
    gated: bool,
    max_error: float | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows // 2 if gated else rows))


def _multiply(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    scale: float,
    gated: bool,
    max_error: float | None = None,
) -> None:
    """`linear` or `gated_linear` into `out`, all on a card."""
    if max_error is not None and _as_integers(x, weight):
        multiply(x, weight, out, residual, scale, gated, max_error)
        return
    format, columns, amd = weight.format, weight.columns, torch.version.hip is not None
    few = len(x) <= sparse.MOST_TOKENS
    # Tensor cores have caught up with dense int4 at two tokens: nothing is to be put in place.
    alone = len(x) == 1 or format.bits == 8 or not _on_tensor_cores(x, weight)
    if few and sparse.supports(format, columns):
        op = sparse.sparse_gather if amd else sparse_gemv
        op(x, weight, out, residual, scale, gated=gated)
    elif few and alone and dense.supports(format, columns):
        dense.dense_gemv(x, weight, out, residual, scale, gated=gated)
    elif len(x) <= MANY and _on_tensor_cores(x, weight):
        matmul(x, weight, out, residual, scale, gated=gated)
    else:
        each = 2 if gated else 1
        for first, part in _parts(weight):
            own = slice(first // each, (first + part.rows) // each)
            added = None if residual is None else residual[:, own]
            _multiply_dense(x, part, out[:, own], added, scale, gated)


def _parts(weight: PackedWeight) -> Iterator[tuple[int, PackedWeight]]:
    """(first row, those rows) of a single weight, each part of whole tiles and a bounded size."""
    step = max(1, MOST_EXPANDED // (weight.columns * TILE))
    if weight.tiles <= step:
        yield 0, weight
        return
    for first in range(0, weight.tiles, step):
        tensors = {name: own[first : first + step] for name, own in weight.tensors().items()}
        rows = min(step * TILE, weight.rows - first * TILE)
        yield first * TILE, from_tensors(weight.format, rows, weight.columns, tensors)


def _multiply_dense(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    scale: float,
    gated: bool,
) -> None:
    """`_multiply` by the weight written out."""
    if len(x) <= sparse.MOST_TOKENS and weight.scales is not None:
        # Weights rounded as results are: of a single token, that can be more than 3e-3 off.
        _multiply_exactly(x, weight, out, residual, scale, gated)
        return
    dense_weight = expand(weight, scratch(weight, x.dtype)).t()
    if gated:
        let_through(torch.mm(x, dense_weight), out)
    elif residual is None:
        torch.addmm(out, x, dense_weight, beta=0, alpha=scale, out=out)
    else:
        torch.addmm(residual, x, dense_weight, beta=scale, alpha=scale, out=out)


def _multiply_exactly(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    scale: float,
    gated: bool,
) -> None:
    """`_multiply_dense` in float32, rounded once."""
    exact = torch.mm(x.float(), expand(weight, scratch(weight, torch.float32)).t())
    if gated:
        gate, up = exact.unflatten(-1, (-1, 2)).unbind(-1)
        exact = F.gelu(gate, approximate="tanh") * up
    elif residual is not None:
        exact += residual
    out.copy_(exact * scale)


def _as_integers(x: Tensor, weight: PackedWeight) -> bool:
    return x.dtype == torch.bfloat16 and supports(weight) and on_hopper(x.device)


def _on_tensor_cores(x: Tensor, weight: PackedWeight) -> bool:
    ours = x.dtype == torch.bfloat16 and torch.version.hip is None
    return ours and decode.supports(weight.format, weight.columns)


@torch.library.custom_op("conclave::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    experts: Tensor,
    gated: bool,
    among: int,
) -> Tensor:
    weight = PackedWeight(Format.parse(format), rows, x.shape[-1], codes, positions, scales)
    supported = any(op.supports(weight.format, weight.columns) for op in (sparse, dense))
    if x.device.type != "cuda" or not supported:
        return reference.grouped_linear(x, weight, experts, gated)
    out = torch.empty(len(x), rows // 2 if gated else rows, dtype=x.dtype, device=x.device)
    _multiply_grouped(x.contiguous(), weight, out, experts.contiguous(), gated, among)
    return out


def _multiply_grouped(
    x: Tensor, weight: PackedWeight, out: Tensor, experts: Tensor, gated: bool, among: int
) -> None:
    """`grouped_linear` into `out`, all on a card; as many tokens at once as a kernel takes."""
    if len(x) > (among or weight.experts or 1) and _on_tensor_cores(x, weight):
        for first in range(0, len(x), MOST_TOKENS):
            part = slice(first, first + MOST_TOKENS)
            matmul(x[part], weight, out[part], experts=experts[part], gated=gated, among=among)
        return
    op = dense.dense_gemv
    if sparse.supports(weight.format, weight.columns):
        op = sparse.sparse_gather if torch.version.hip is not None else sparse_gemv
    for first in range(0, len(x), MOST_COPIES):
        part = slice(first, first + MOST_COPIES)
        op(x[part], weight, out[part], experts=experts[part], gated=gated)


@_grouped_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    positions: Tensor | None,
    scales: Tensor | None,
    format: str,
    rows: int,
    experts: Tensor,
    gated: bool,
    among: int,
) -> Tensor:
    return x.new_empty((len(x), rows // 2 if gated else rows))
