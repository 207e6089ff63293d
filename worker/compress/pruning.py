"""Which weights survive and what values they get: one matrix at a time, three ways.

    magnitude   the largest of each 16, rounded to nearest
    wanda       the largest |w| * |x| of each 16 (Sun et al. 2023, arXiv:2306.11695), likewise
    sparsegpt   the least harm by the layer's own inputs (Frantar and Alistarh 2023,
                arXiv:2301.00774), each error made up for by the columns behind it, values rounded
                in the same sweep (GPTQ, arXiv:2210.17323)

`moments` are x^T x of the matrix's inputs, [K, K]: what the sum of squared errors of its outputs
depends on. Plain torch, float32, on the weight's device; the same inputs give the same bytes.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ...kernels.formats import SPAN, Format, PackedWeight
from ...kernels.integer.weights import Ruler, pack_whole
from ...kernels.layouts import pack
from ..errors import ConfigError

Mode = Literal["magnitude", "wanda", "sparsegpt"]
MODES: tuple[Mode, ...] = get_args(Mode)
_COLUMNS = 2048
"""Of a factor that are found at once."""
DAMPING = 0.01
"""Of the mean of the moments' diagonal, added to it, so that they can be inverted."""
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of the largest weight that a scale may reach to: clipping a few makes the rest finer."""


def compress(
    weight: Tensor,
    moments: Tensor,
    format: Format,
    mode: Mode,
    mask: Tensor | None = None,
    whole: bool = False,
) -> PackedWeight:
    """`weight` [R, K] in `format`; `moments` [K, K] of its inputs, which "magnitude" ignores.

    A `mask` (bool [R, K]) tells who survives; only values are then chosen by `mode`. If `whole`,
    scales of 4-bit formats are whole numbers of units (`kernels.integer.weights`). Raises
    ConfigError for moments that are not finite, and LayoutError as `pack` does.
    """
    whole = whole and format.bits == 4
    by_size = pack_whole if whole else pack
    if mode == "magnitude":
        return by_size(weight, format, mask=mask)
    moments = moments.float()
    if not bool(moments.isfinite().all()):
        raise ConfigError("the calibration's activations overflow float32; use other text")
    if mode == "wanda":
        if mask is None:
            strength = weight.float().abs() * moments.diagonal().sqrt()
            mask = strongest(strength, format.kept)
        return by_size(weight, format, mask=mask)
    values, mask, scales = _sweep(weight, moments, format, mask, whole)
    return pack(values, format, mask=mask, scales=scales)


def strongest(strength: Tensor, kept: int) -> Tensor:
    """bool [R, K] with exactly `kept` of each 16: the strongest, then the first of those alike."""
    groups = strength.unflatten(1, (-1, SPAN))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros(groups.shape, dtype=torch.bool, device=strength.device)
    return chosen.scatter_(-1, order[..., :kept], True).flatten(1)


def output_error(weight: Tensor, changed: Tensor, moments: Tensor) -> float:
    """|x (weight - changed)^T|^2 / |x weight^T|^2 over the inputs of `moments`."""
    moments = moments.float()
    off = weight.float() - changed.float()
    base = ((weight.float() @ moments) * weight.float()).sum()
    return float(((off @ moments) * off).sum() / base)


def _sweep(
    weight: Tensor, moments: Tensor, format: Format, fixed: Tensor | None, whole: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """SparseGPT with rounding: values [R, K], mask [R, K], scales [K / group, R] or None.

    The mask is the `fixed` one if there is one. If `whole`, what scales are multiples of follows
    from the weight as it was, before the sweep comes to know them.
    """
    planned = pack_whole(weight, format, mask=fixed).scales if whole else None
    ruler = None if planned is None else Ruler.of(_by_group(planned, len(weight)))
    work = weight.float().clone()
    factor = _inverse_factor(moments)
    columns, width = work.shape[1], format.group or 8 * SPAN
    mask = torch.empty(work.shape, dtype=torch.bool, device=work.device) if fixed is None else fixed
    values, scales = torch.empty_like(work), []
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        own, block = factor[begin:end, begin:end], work[:, begin:end].clone()
        errors, scale = torch.empty_like(block), None
        if format.group:
            likely = mask[:, begin:end]
            if fixed is None:
                likely = strongest(_harm(block, own), format.kept)
            survivors = torch.where(likely, block, 0.0)
            scale = _best_scale(survivors, format.bits)
            if ruler is not None:
                near = [ruler.nearest(scale, begin // width, beside) for beside in (-1, 0, 1)]
                scale = _best_of(near, survivors, format.bits)
            scales.append(scale)
        for first in range(0, end - begin, SPAN):
            span = slice(first, first + SPAN)
            chosen = mask[:, begin + first : begin + first + SPAN]
            if fixed is None:
                chosen.copy_(strongest(_harm(block[:, span], own[span, span]), format.kept))
            for column in range(first, first + SPAN):
                kept = _round(block[:, column], scale, format.bits) * chosen[:, column - first]
                values[:, begin + column] = kept
                error = (block[:, column] - kept) / own[column, column]
                block[:, column:] -= error[:, None] * own[column, column:]
                errors[:, column] = error
        work[:, end:] -= errors @ factor[begin:end, end:]
    return values, mask, torch.stack(scales) if scales else None


def _by_group(scales: Tensor, rows: int) -> Tensor:
    """[K / group, R] of scales as they are stored, [T, K / group, 128]."""
    return scales.movedim(0, 1).flatten(1)[:, :rows]


def _harm(block: Tensor, factor: Tensor) -> Tensor:
    """What the outputs lose if a weight goes and the columns behind it make up for it."""
    return (block / factor.diagonal()).square()


def _inverse_factor(moments: Tensor) -> Tensor:
    """U, float32, upper triangular [K, K], with U^T U the inverse of the damped moments H.

    With rows and columns in reverse, H is M M^T, M lower triangular, and U is the inverse of M in
    reverse: no inverse of H is needed, which in float64 takes twice the memory. Inputs that are
    always zero keep the damping alone, so that their weights seem to do no harm.
    """
    # In float64, since thousands of columns of nearly equal inputs leave float32 no positive pivot.
    reverse = moments.flip(0, 1).double()
    diagonal = reverse.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    lower, count = torch.linalg.cholesky(reverse), len(moments)
    del reverse, diagonal  # a large one is gigabytes
    factor = torch.zeros_like(moments)
    for begin in range(0, count, _COLUMNS):
        end = min(begin + _COLUMNS, count)  # above which these columns of M's inverse are zero
        part = lower.new_zeros(count - begin, end - begin)
        part.fill_diagonal_(1.0)
        solved = torch.linalg.solve_triangular(lower[begin:, begin:], part, upper=False)
        factor[: count - begin, count - end : count - begin] = solved.flip(0, 1)
    return factor


def _best_scale(block: Tensor, bits: int) -> Tensor:
    """float32 [R] of bfloat16 values: of several clippings the one with the least squared error."""
    limit, largest = 2 ** (bits - 1) - 1, block.abs().amax(1)
    clips = _CLIPS if bits < 8 else _CLIPS[:1]
    return _best_of([(largest * clip / limit).bfloat16().float() for clip in clips], block, bits)


def _best_of(scales: Sequence[Tensor], block: Tensor, bits: int) -> Tensor:
    """Of each row's scales, float32 [R], the first with the least squared error."""
    best, least = torch.zeros_like(scales[0]), torch.full_like(scales[0], torch.inf)
    for scale in scales:
        error = (_round(block, scale[:, None], bits) - block).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _round(values: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """The nearest values that the format has."""
    if scale is None:
        return values.bfloat16().float()
    limit = 2 ** (bits - 1)
    codes = (values / torch.where(scale > 0, scale, 1.0)).round().clamp(-limit, limit - 1)
    return codes * scale
