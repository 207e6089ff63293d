"""Five to some hundred tokens times a packed weight on NVIDIA's tensor cores.

y[m, r] = sum of x[m, k] * code * scale, with each weight decoded once for all tokens of a program
(`decode` tells how) and never written anywhere. A program has a tile of 128 rows, up to 64 tokens
and a share of the groups of columns; four warps have 32 rows each. Its activations pass through
shared memory, in the interleaved order. Sums of a scale's columns are exact products of integers
and bfloat16 in float32; then they are scaled. Bytes moved: the packed weight once for every 64
tokens.

More than `FEW` tokens of a single weight are multiplied by `persistent` on Hopper, which decodes
once for every 256; nine to `FEW`, of an N:16 int4 weight, by `staged`. Of a stack, each program has
tokens of one expert (`grouping`), on Hopper up to 128.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import misfit
from ..errors import KernelInputError
from ..formats import SHIPPED, Format, PackedWeight
from ..launching.launch import Kernel, Variant
from ..launching.overlap import overlap_options
from ..launching.targets import HOPPER, KIB, NVIDIA, target_of
from ..tuning import matmul_splits, persistent_programs
from ..workspace import COUNTERS, epilogue_of, workspace
from .decode import STEP, interleave, supports, word_layout
from .grouping import MOST_TOKENS, expert_blocks
from .mma import tile_mma
from .persistent import tile_persistent
from .row_pairs import ROWS, arrange
from .staged import tile_staged
from .wgmma import has_tiny, tile_wgmma

WARPS = 4
WARPS_PERSISTENT = 8
FEW = 64
"""Tokens up to which `wgmma` multiplies a single weight on Hopper; above, `persistent` does."""
_MULTIPLES = ("columns",)
_GRID = "blocks of TOKENS, tiles, splits"
_interleaved = Kernel(interleave, grid="cdiv(count, BLOCK)", multiples_of_16=("count", "columns"))
_mma = Kernel(tile_mma, grid=_GRID, multiples_of_16=_MULTIPLES)
_wgmma = Kernel(tile_wgmma, grid=_GRID, multiples_of_16=_MULTIPLES)
_arranged = Kernel(arrange, grid="blocks of TOKENS * columns / BLOCK", multiples_of_16=_MULTIPLES)
_staged = Kernel(
    tile_staged,
    grid="blocks of TOKENS, programs (EVEN), or tiles and splits",
    multiples_of_16=_MULTIPLES,
)
_persistent = Kernel(tile_persistent, grid="blocks of TOKENS, programs", multiples_of_16=_MULTIPLES)
_BLOCK = 1024
_PHASES = {8: 768, 16: 768, 32: 384, 64: 384, 128: 128}
"""Columns whose activations `wgmma` copies at once, at most, by tokens of a program."""
_PROGRAMS_EACH = {16: 4, 32: 3, 64: 2}
"""Of `mma` that fit a processor, by tokens of a program."""
_OTHERS = tuple(target for target in NVIDIA if not target.is_hopper)


class Staged(NamedTuple):
    """How `staged` multiplies so many tokens."""

    each: int
    """Programs that a processor has at a time, if its shared memory has room for them."""
    even: bool
    """Tiles are shared evenly by all programs that run at once; else split (`matmul_splits`)."""


STAGED = {16: Staged(4, False), 32: Staged(3, True), 64: Staged(2, True)}
"""By tokens of a program; of eight, `wgmma` is as fast (an H100, three shapes)."""
_STEPS, _SIDES = 4, 2
"""Steps of 64 columns that `staged` copies together, and places for them: one is multiplied, the
other's copies are under way."""


class Plan(NamedTuple):
    """How some tokens are multiplied."""

    kernel: Kernel
    block: int
    """Tokens of a program."""
    each: int
    """Programs that a processor is to have at a time."""
    constants: dict[str, object]
    options: dict[str, int]


def _plan(format: Format, tokens: int, hopper: bool, least: int = 16) -> Plan:
    """For so many tokens of one weight or expert."""
    most = 128 if hopper else 64
    block = max(least if hopper else 16, min(most, 1 << (tokens - 1).bit_length()))
    constants = {
        **{"KEPT": format.kept, "BITS": format.bits, "GROUP": format.group, "TOKENS": block},
        "WORDS": word_layout(format, WARPS),
    }
    if not hopper:
        return Plan(_mma, block, _PROGRAMS_EACH[block], constants, {})
    # Which way to load early is faster differs (docs/log.md).
    ahead = 2 if block in (8, 64) and not format.dense else 1
    registers = _registers(format, block)
    each = 1 if block > 64 else 65536 // (WARPS * 32 * registers)
    # Of a group, activations and sums; there are two places for a phase.
    room = (228 * KIB // each - KIB) // (2 * block * (2 * format.group + 32))
    constants |= {"PHASE": min(_PHASES[block] // format.group, room), "AHEAD": ahead}
    return Plan(_wgmma, block, each, constants, {"launch_pdl": True, "maxnreg": registers})


def _staged_plan(format: Format, tokens: int) -> tuple[Plan, Staged] | None:
    """For so many tokens of one weight on Hopper, if `staged` takes them."""
    block = max(8, 1 << (tokens - 1).bit_length())
    how = STAGED.get(block)
    if how is None or format.bits != 4 or format.dense:
        return None
    phase = max(1, _STEPS * 64 // format.group)
    constants = {
        **{"KEPT": format.kept, "BITS": 4, "GROUP": format.group, "TOKENS": block},
        **{"PHASE": phase, "SIDES": _SIDES, "EVEN": how.even},
        "WORDS": word_layout(format, WARPS),
    }
    # Of 64 columns activations and words; of a group scales and sums.
    steps = _SIDES * phase * format.group // 64
    taken = steps * (128 * block + 512 * format.kept) + _SIDES * phase * (256 + 32 * block)
    each = min(how.each, 228 * KIB // (taken + KIB + 16))
    registers = min(255, 65536 // (WARPS * 32 * each) // 8 * 8)
    return Plan(_staged, block, each, constants, {"launch_pdl": True, "maxnreg": registers}), how


def _registers(format: Format, block: int) -> int:
    """Of a thread of `wgmma` at most: what no loop spills anything with.

    With 96, 128 and 168 five, four and three programs fit a processor.
    """
    if block > 32 or (format.bits == 8 and block == 32):
        return 255
    if block == 32 or format.bits == 8:
        return 168
    return 96 if block == 8 and format.kept == 5 and format.group == 128 else 128


def _persistent_plan(format: Format, tokens: int) -> tuple[int, dict[str, object]]:
    """How many tokens a program has, and the constants of `persistent`."""
    blocks = -(-tokens // 256)
    block = next(size for size in (128, 192, 256) if size * blocks >= tokens)
    constants = {
        **{"KEPT": format.kept, "BITS": format.bits, "GROUP": format.group, "TOKENS": block},
        "AHEAD": 3 if format.kept <= 6 else 1,
        "WORDS": word_layout(format, WARPS_PERSISTENT, ROWS),
    }
    return block, constants


def variants() -> Iterator[Variant]:
    """What the bundle holds: the usual formats."""
    for target in NVIDIA:
        overlap, hopper = target.capability >= 90, target.capability == 90
        copied = ("*bf16", "*bf16", "*bf16", "i32", "i32", "i32")
        for group in (0, 64, 128) if hopper else (0,):
            order = {"TOGETHER": hopper, "GROUP": group, "BLOCK": _BLOCK, "OVERLAP": overlap}
            yield Variant(_interleaved, copied, order, 4, 1, (target,), overlap_options(overlap))
    for tokens, sparse in product((128, 192, 256), (False, True)):
        order = {"TOKENS": tokens, "SPARSE": sparse, "BLOCK": _BLOCK, "OVERLAP": True}
        yield Variant(
            _arranged, ("*bf16", "*bf16", "i32", "i32"), order, 4, 1, HOPPER, overlap_options(True)
        )
    for format in filter(lambda each: supports(each, STEP * 2), SHIPPED):
        codes = "*i32" if format.dense and format.bits == 4 else "*i8" if format.dense else "*u8"
        weight = (codes, "*bf16", "*bf16")
        types = (*weight, "*i32", "*fp32", "*i32", *["i32"] * 5, "fp32")
        for targets, sizes in ((HOPPER, (8, 16, 32, 64, 128)), (_OTHERS, (16, 32, 64))):
            for tokens in sizes:
                hopper = targets is HOPPER
                plan = _plan(format, tokens, hopper, 8)
                own = (*["*bf16"] * (3 if hopper else 2), *types)
                yield Variant(plan.kernel, own, plan.constants, WARPS, 1, targets, plan.options)
        own = (*["*bf16"] * 3, *weight, "*fp32", "*i32", *["i32"] * 5, "fp32")
        for tokens in STAGED:
            found = _staged_plan(format, tokens)
            if found is not None:
                plan = found[0]
                yield Variant(plan.kernel, own, plan.constants, WARPS, 1, HOPPER, plan.options)
        types = ("*bf16", "*bf16", *weight, "*fp32", "*i32", *["i32"] * 5, "fp32")
        for tokens in (128, 192, 256):
            constants, options = _persistent_plan(format, tokens)[1], overlap_options(True)
            yield Variant(_persistent, types, constants, WARPS_PERSISTENT, 1, HOPPER, options)


def matmul(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None = None,
    scale: float = 1.0,
    experts: Tensor | None = None,
    gated: bool = False,
    among: int = 0,
) -> None:
    """(x weight^T + residual) * scale of bfloat16 [tokens, K] into `out` [tokens, R].

    Or, with `experts` (int32 [tokens], equal ones side by side, each an index into the stack), each
    token by its own weight, as of a stack of `among` if that is not 0. `gated` takes rows 2i and
    2i + 1 as a gate and its input: gelu(gate) * input, into `out` [tokens, R/2]. All contiguous and
    on one NVIDIA card from sm_80 on; results depend on no timing. Meant for 5 to some hundred
    tokens. Raises `KernelInputError` if something does not fit.
    """
    _check(x, weight, out, residual, experts, gated)
    target = target_of(x.get_device())
    hopper, overlap = target.capability == 90, target.capability >= 90
    # Results of two rows are stored as one word.
    fits = weight.rows % 2 == 0 and -(-len(x) // 256) * weight.tiles <= COUNTERS
    if hopper and experts is None and len(x) > FEW and fits:
        _matmul_persistent(x, weight, out, residual, scale, gated)
        return
    format, columns = weight.format, weight.columns
    if hopper and experts is None and len(x) <= FEW and fits:
        found = _staged_plan(format, len(x))
        if found is not None:
            _matmul_staged(x, weight, out, residual, scale, gated, *found)
            return
    # Twice what an expert has on average: most then have room in one block.
    stack = among or weight.experts or 1
    usual = len(x) if experts is None else -(-2 * len(x) // stack)
    plan = _plan(format, usual, hopper, 8 if experts is None else 16)
    chunks = columns // format.group
    tiny = hopper and has_tiny(format.bits, plan.block)
    ordered, sums = _ordered(x, plan.block, format.group, hopper, tiny, overlap)
    partials, counters = workspace(x.device)
    if experts is None:
        blocks, count = counters, -(-len(x) // plan.block)
    else:
        blocks = expert_blocks(experts, stack, plan.block)
        count = len(blocks)
    splits = matmul_splits(x.device, weight.tiles, chunks, count, plan.block, plan.each)
    plan.kernel.launch(
        (count, weight.tiles, splits),
        *(out, ordered, *([sums] if hopper else []), weight.codes, weight.scales),
        *(out if residual is None else residual, blocks, partials, counters),
        *(len(x), weight.rows, columns),
        *(epilogue_of(residual, gated), int(experts is not None), float(scale)),
        constants=plan.constants,
        warps=WARPS,
        stages=1,
        options=plan.options,
    )


def _ordered(
    x: Tensor, block: int, group: int, together: bool, tiny: bool, overlap: bool
) -> tuple[Tensor, Tensor]:
    """x in the order of decoded weights; if they are `tiny`, the sums of its groups, too."""
    # Whole blocks are read.
    columns, lines = x.shape[1], len(x) + block
    ordered = x.new_empty(lines * (columns + columns // group * 16))
    sums = ordered[lines * columns :]
    _interleaved.launch(
        (-(-x.numel() // _BLOCK),),
        *(ordered, sums, x, x.numel(), columns, lines),
        constants={
            **{"TOGETHER": together, "GROUP": group if tiny else 0},
            **{"BLOCK": _BLOCK, "OVERLAP": overlap},
        },
        warps=4,
        stages=1,
        options=overlap_options(overlap),
    )
    return ordered, sums


def _matmul_staged(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None,
    scale: float,
    gated: bool,
    plan: Plan,
    how: Staged,
) -> None:
    """`matmul` of few tokens, all through shared memory."""
    group, tiles = weight.format.group, weight.tiles
    ordered, sums = _ordered(x, plan.block, group, True, True, True)
    chunks, blocks = weight.columns // group, -(-len(x) // plan.block)
    shape = (x.device, tiles, chunks, blocks, plan.block, plan.each)
    if how.even:
        grid: tuple[int, ...] = (blocks, persistent_programs(*shape))
    else:
        grid = (blocks, tiles, matmul_splits(*shape))
    partials, counters = workspace(x.device)
    plan.kernel.launch(
        grid,
        *(out, ordered, sums, weight.codes, weight.scales),
        *(out if residual is None else residual, partials, counters),
        *(len(x), weight.rows, weight.columns, tiles),
        *(epilogue_of(residual, gated), float(scale)),
        constants=plan.constants,
        warps=WARPS,
        stages=1,
        options=plan.options,
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
    order = {"TOKENS": each, "SPARSE": not weight.format.dense, "BLOCK": _BLOCK, "OVERLAP": True}
    _arranged.launch(
        (ordered.numel() // _BLOCK,),
        *(ordered, x, len(x), weight.columns),
        constants=order,
        warps=4,
        stages=1,
        options=overlap_options(True),
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
        options=overlap_options(True),
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
