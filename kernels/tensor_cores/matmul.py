"""Five to some hundred tokens times a packed weight on NVIDIA's tensor cores.

y[m, r] = sum of x[m, k] * code * scale, with each weight decoded once for all tokens of a program
(`decode` tells how) and never written anywhere. A program has a tile of 128 rows, up to 128 tokens
and every `splits`-th group of columns; four warps have 32 rows each. Its activations pass through
shared memory, in the interleaved order. Sums of a scale's columns are exact products of integers
and bfloat16 in float32; then they are scaled. Bytes moved: the packed weight once for every 64 or
128 tokens.

More than `FEW` tokens of a single weight are multiplied by `persistent` on Hopper, which decodes
once for every 256. Of a stack, each program has tokens of one expert (`grouping`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import misfit
from ..errors import KernelInputError
from ..formats import SHIPPED, Format, PackedWeight
from ..launching.launch import Kernel, Variant
from ..launching.targets import NVIDIA, target_of
from ..tuning import matmul_splits, persistent_programs
from ..workspace import COUNTERS, epilogue_of, workspace
from .decode import STEP, interleave, supports, word_layout
from .grouping import MOST_TOKENS, expert_blocks
from .mma import tile_mma
from .persistent import tile_persistent
from .row_pairs import ROWS, arrange
from .wgmma import tile_wgmma

WARPS = 4
WARPS_PERSISTENT = 8
FEW = 128
"""Tokens up to which `wgmma` is used on Hopper; above, `persistent`."""
_MULTIPLES = ("columns",)
_GRID = "blocks of TOKENS, tiles, splits"
_interleaved = Kernel(interleave, grid="cdiv(count, BLOCK)", multiples_of_16=("count",))
_mma = Kernel(tile_mma, grid=_GRID, multiples_of_16=_MULTIPLES)
_wgmma = Kernel(tile_wgmma, grid=_GRID, multiples_of_16=_MULTIPLES)
_arranged = Kernel(arrange, grid="blocks of TOKENS * columns / BLOCK", multiples_of_16=_MULTIPLES)
_persistent = Kernel(tile_persistent, grid="blocks of TOKENS, programs", multiples_of_16=_MULTIPLES)
_BLOCK = 1024
_HOPPER = tuple(target for target in NVIDIA if target.capability == 90)
_OTHERS = tuple(target for target in NVIDIA if target.capability != 90)


def _plan(format: Format, tokens: int, hopper: bool) -> tuple[Kernel, int, dict[str, object]]:
    """The kernel for so many tokens, how many of them a program has, and its constants."""
    most = 128 if hopper else 64
    block = max(16, min(most, 1 << (tokens - 1).bit_length()))
    constants = {
        **{"KEPT": format.kept, "BITS": format.bits, "GROUP": format.group, "TOKENS": block},
        "WORDS": word_layout(format, WARPS),
    }
    if not hopper:
        return _mma, block, constants
    return _wgmma, block, {**constants, "STAGES": 4 if block == 16 else 3, "FOLD": block > 64}


def _persistent_plan(format: Format, tokens: int) -> tuple[int, dict[str, object]]:
    """How many tokens a program has, and the constants of `persistent`."""
    blocks = -(-tokens // 256)
    block = next(size for size in (128, 192, 256) if size * blocks >= tokens)
    constants = {
        **{"KEPT": format.kept, "BITS": format.bits, "GROUP": format.group, "TOKENS": block},
        **{"STAGES": 4, "SHIFTED": block > 128 and not format.dense},
        **{"AHEAD": 3 if format.kept <= 6 else 1, "OVERLAP": True},
        "DEEP": format.group > 64,
        "WORDS": word_layout(format, WARPS_PERSISTENT, ROWS),
    }
    return block, constants


def variants() -> Iterator[Variant]:
    """What the bundle holds: the usual formats."""
    for target in NVIDIA:
        overlap = target.capability >= 90
        order = {"BLOCK": _BLOCK, "OVERLAP": overlap}
        copied = ("*bf16", "*bf16", "i32")
        yield Variant(_interleaved, copied, order, 4, 1, (target,), _options(overlap))
    for tokens, shifted in ((128, False), (192, False), (192, True), (256, False), (256, True)):
        order = {"TOKENS": tokens, "SHIFTED": shifted, "BLOCK": _BLOCK, "OVERLAP": True}
        copied = ("*bf16", "*bf16", "i32", "i32")
        yield Variant(_arranged, copied, order, 4, 1, _HOPPER, _options(True))
    for format in filter(lambda each: supports(each, STEP * 2), SHIPPED):
        codes = "*i32" if format.dense and format.bits == 4 else "*i8" if format.dense else "*u8"
        types = (
            *("*bf16", "*bf16", codes, "*bf16", "*bf16", "*i32", "*fp32", "*i32"),
            *(*["i32"] * 5, "fp32"),
        )
        for targets, sizes in ((_HOPPER, (16, 32, 64, 128)), (_OTHERS, (16, 32, 64))):
            for tokens in sizes:
                kernel, _, constants = _plan(format, tokens, targets is _HOPPER)
                yield Variant(kernel, types, constants, WARPS, 1, targets)
        types = ("*bf16", "*bf16", codes, "*bf16", "*bf16", "*fp32", "*i32", *["i32"] * 5, "fp32")
        for tokens in (128, 192, 256):
            constants = _persistent_plan(format, tokens)[1]
            warps, options = WARPS_PERSISTENT, _options(True)
            yield Variant(_persistent, types, constants, warps, 1, _HOPPER, options)


def _options(overlap: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if overlap else {}


def matmul(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None = None,
    scale: float = 1.0,
    experts: Tensor | None = None,
    gated: bool = False,
) -> None:
    """(x weight^T + residual) * scale of bfloat16 [tokens, K] into `out` [tokens, R].

    Or, with `experts` (int32 [tokens], ascending, each an index into the stack), each token by its
    own weight. `gated` takes rows 2i and 2i + 1 as a gate and its input: gelu(gate) * input, into
    `out` [tokens, R/2]. All contiguous and on one NVIDIA card from sm_80 on; results depend on no
    timing. Meant for 5 to some hundred tokens. Raises `KernelInputError` if something does not fit.
    """
    _check(x, weight, out, residual, experts, gated)
    target = target_of(x.get_device())
    # Results of two rows are stored as one word.
    fits = weight.rows % 2 == 0 and -(-len(x) // 256) * weight.tiles <= COUNTERS
    if experts is None and len(x) > FEW and fits and target.capability == 90:
        _matmul_persistent(x, weight, out, residual, scale, gated)
        return
    overlap = target.capability >= 90
    ordered = torch.empty_like(x)
    _interleaved.launch(
        (-(-x.numel() // _BLOCK),),
        *(ordered, x, x.numel()),
        constants={"BLOCK": _BLOCK, "OVERLAP": overlap},
        warps=4,
        stages=1,
        options=_options(overlap),
    )
    partials, counters = workspace(x.device)
    if experts is None:
        kernel, each, constants = _plan(weight.format, len(x), target.capability == 90)
        blocks, count = counters, -(-len(x) // each)
    else:
        # Twice what an expert has on average: most then have room in one block.
        usual = -(-2 * len(x) // (weight.experts or 1))
        kernel, each, constants = _plan(weight.format, usual, target.capability == 90)
        blocks = expert_blocks(experts, weight.experts or 1, each)
        count = len(blocks)
    chunks = weight.columns // weight.format.group
    splits = matmul_splits(x.device, weight.tiles, chunks, count, each)
    kernel.launch(
        (count, weight.tiles, splits),
        *(out, ordered, weight.codes, weight.scales, out if residual is None else residual),
        *(blocks, partials, counters, len(x), weight.rows, weight.columns),
        *(epilogue_of(residual, gated), int(experts is not None), float(scale)),
        constants=constants,
        warps=WARPS,
        stages=1,
    )


def _matmul_persistent(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    scale: float,
    gated: bool,
) -> None:
    """`matmul` by programs that share all tiles evenly."""
    each, constants = _persistent_plan(weight.format, len(x))
    blocks = -(-len(x) // each)
    ordered = x.new_empty(blocks * each, weight.columns)
    order = {"TOKENS": each, "SHIFTED": constants["SHIFTED"], "BLOCK": _BLOCK, "OVERLAP": True}
    _arranged.launch(
        (ordered.numel() // _BLOCK,),
        *(ordered, x, len(x), weight.columns),
        constants=order,
        warps=4,
        stages=1,
        options=_options(True),
    )
    chunks = weight.columns // weight.format.group
    programs = persistent_programs(x.device, weight.tiles, chunks, blocks, each)
    _persistent.launch(
        (blocks, programs),
        *(out, ordered, weight.codes, weight.scales, out if residual is None else residual),
        *(*workspace(x.device), len(x), weight.rows, weight.columns, weight.tiles),
        *(epilogue_of(residual, gated), float(scale)),
        constants=constants,
        warps=WARPS_PERSISTENT,
        stages=1,
        options=_options(bool(constants["OVERLAP"])),
    )


def _check(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    experts: Tensor | None,
    gated: bool,
) -> None:
    """KernelInputError unless `matmul` can take these."""
    if not supports(weight.format, weight.columns):
        fault = f"takes N:16 int4 and dense weights in groups of 64 or 128, not {weight.format}"
    elif x.dtype != torch.bfloat16:
        fault = f"x is {x.dtype}; it must be bfloat16"
    elif x.device.type != "cuda" or torch.version.hip is not None:
        fault = "runs on NVIDIA's cards alone"
    elif experts is not None and len(experts) > MOST_TOKENS:
        fault = f"{len(experts)} tokens of experts; it takes up to {MOST_TOKENS} at once"
    else:
        fault = misfit(x, weight, out, residual, experts, gated)
    if fault:
        raise KernelInputError(f"matmul: {fault}")
