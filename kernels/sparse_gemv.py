"""One to four tokens times an N:16 int4 weight: y[m, r] = sum of x[m, k] * code * scale.

At so few tokens the time is that of reading the weight: 0.33 bytes a weight at 5:16, each byte
once, coalesced over rows. So what counts is to have few instructions a survivor and many loads
under way; tensor cores would need the weight dense.

A program has one tile of 128 rows and every `splits`-th piece of 64 columns; its warps take pieces
side by side. Four rows' bytes are one word of a lane, and those of the next piece are loaded before
this one is computed. The programs' sums meet as told in `workspace`.

On NVIDIA's cards the 16 values of x that a word's positions choose from lie in the lanes, and a
shuffle fetches each: its index is the lowest five bits of the byte, so lanes 16 to 31 hold the same
values again and nothing needs to be masked. The value comes from the byte's high nibble by an
AND-XOR into the mantissa of a float (2^23 + 16 (value + 8)), from which one subtraction leaves 16
times the value. One token is summed in float32: 4.75 instructions a survivor. Two to four tokens
are packed in pairs of halves, scaled by a power of two for 64 columns (`_pairs`, one more launch)
so that sums of 64 columns fit float16; beyond those it is float32.

`sparse_gather` is the same in plain Triton, for all other processors.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formats import SHIPPED, TILE, PackedWeight
from .launching.launch import Kernel, Variant
from .launching.overlap import both_ways, overlap_options, overlaps_on
from .launching.targets import NVIDIA
from .sparse_gather import FEW_TYPES, PIECE, check_few, supports
from .tuning import gemv_plan
from .workspace import in_groups, meet, workspace

_TILE = tl.constexpr(TILE)

# Of each byte j of word $4, with x of the lanes in $5: $j = $(6 + j) + 16 * value * x[position].
_FLOAT = tl.constexpr(
    "{ .reg .b32 part, byte, picked; .reg .f32 value, factor;"
    + "".join(
        f"shr.u32 byte, $4, {8 * j}; shfl.sync.idx.b32 picked, $5, byte, 31, -1;"
        "lop3.b32 part, byte, 0xF0, 0x4B000080, 0x6A; mov.b32 value, part;"
        f"sub.f32 value, value, 0f4B000080; mov.b32 factor, picked;"
        f"fma.rn.f32 ${j}, value, factor, ${6 + j};"
        for j in range(4)
    )
    + "}"
)
_FLOAT_REGISTERS = tl.constexpr("=&f,=&f,=&f,=&f,r,r,f,f,f,f")

# The same with a pair of halves in each x and sum: 1024 + 16 (value + 8) of bytes 0 and 2, 1 and 3.
_HALF = tl.constexpr(
    "{ .reg .b32 even, odd, byte, minus, picked, both; .reg .b16 low, high;"
    "mov.b32 minus, 0xE480E480; shr.u32 odd, $4, 8;"
    "lop3.b32 even, $4, 0x00F000F0, 0x64806480, 0x6A; add.rn.f16x2 even, even, minus;"
    "lop3.b32 odd, odd, 0x00F000F0, 0x64806480, 0x6A; add.rn.f16x2 odd, odd, minus;"
    + "".join(
        f"mov.b32 {{low, high}}, {'odd' if j % 2 else 'even'};"
        f"mov.b32 both, {'{high, high}' if j > 1 else '{low, low}'};"
        f"shr.u32 byte, $4, {8 * j}; shfl.sync.idx.b32 picked, $5, byte, 31, -1;"
        f"fma.rn.f16x2 ${j}, both, picked, ${6 + j};"
        for j in range(4)
    )
    + "}"
)
_HALF_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r")
_UNPACK = tl.constexpr(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
)


@triton.jit
def _words(place, fits, COUNT: tl.constexpr):
    """The words of COUNT slots in a row, four rows each."""
    words = ()
    for slot in tl.static_range(COUNT):
        word = tl.load(place + slot * 32, mask=fits, other=0, eviction_policy="evict_first")
        words = words + (word,)
    return words


@triton.jit
def _halves_of(word):
    return word.to(tl.int32), (word >> 32).to(tl.int32)


@triton.jit
def _activations(x, column, fits, PAIRS: tl.constexpr):
    """What the lanes hold of four 16-column groups: bits of a float32, or PAIRS pairs of halves."""
    held = ()
    for group in tl.static_range(4):
        if PAIRS == 0:
            value = tl.load(x + column + 16 * group, mask=fits, other=0.0).to(tl.float32)
            held = held + (value.to(tl.int32, bitcast=True),)
        elif PAIRS == 1:
            held = held + (tl.load(x + column + 16 * group, mask=fits, other=0),)
        else:
            wide = x.to(tl.pointer_type(tl.int64))
            held = held + _halves_of(tl.load(wide + column + 16 * group, mask=fits, other=0))
    return held


@triton.jit
def _four_scales(word):
    """float32 scales of four rows from the four bfloat16 of an int64."""
    low, high = _halves_of(word)
    return (
        (low << 16).to(tl.float32, bitcast=True),
        ((low >> 16) << 16).to(tl.float32, bitcast=True),
        (high << 16).to(tl.float32, bitcast=True),
        ((high >> 16) << 16).to(tl.float32, bitcast=True),
    )


@triton.jit
def _rows_of(sums, FIRST: tl.constexpr, STEP: tl.constexpr):
    """[WARPS, 32, 2, 2]: the sums of a lane's four rows, in the order of the rows."""
    even = tl.join(sums[FIRST], sums[FIRST + 2 * STEP])
    odd = tl.join(sums[FIRST + STEP], sums[FIRST + 3 * STEP])
    return tl.join(even, odd)


@triton.jit
def _prefetch(place, lane, SIZE: tl.constexpr):
    """Brings SIZE bytes from the place of lane 0 into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 size; setp.eq.s32 first, $2, 0; mov.b32 size, $3;"
        "@first cp.async.bulk.prefetch.L2.global [$1], size; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [place.to(tl.int64, bitcast=True), lane, SIZE],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _sparse_gemv(
    y,
    x,
    factors,
    codes,
    scales,
    residual,
    experts,
    partials,
    counters,
    tokens,
    rows,
    columns,
    added,
    grouped,
    scale,
    ahead,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
    GROUPED: tl.constexpr,
    GATED: tl.constexpr,
):
    if OVERLAP and not GATED:
        tl.extra.cuda.gdc_launch_dependents()
    lane = tl.arange(0, 32)[None, :]
    warp = tl.arange(0, WARPS)[:, None]
    step = tl.num_programs(1) * WARPS
    tile = tl.program_id(0).to(tl.int64)
    if grouped > 0:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        tile += tl.load(experts + tl.program_id(2)) * tl.num_programs(0)
        x += tl.program_id(2) * columns
    words = codes.to(tl.pointer_type(tl.int32)) + tile * (columns // 16 * KEPT * 32) + lane
    fours = scales.to(tl.pointer_type(tl.int64)) + tile * (columns // GROUP * 32) + lane
    zero = tl.zeros([WARPS, 32], tl.float32)
    none = tl.zeros([WARPS, 32], tl.int32)
    EACH: tl.constexpr = 2 if PAIRS else 1
    sums = ()
    for _ in tl.static_range(4 * EACH * (PAIRS if PAIRS else 1)):
        sums = sums + (zero,)
    pieces = columns // 64
    begin = tl.program_id(1) * WARPS
    piece = begin + warp
    next_words = _words(words + piece * (4 * KEPT * 32), piece < pieces, 4 * KEPT)
    if OVERLAP:
        # What is read next comes closer while the kernel before this one ends.
        for near in range(begin + step, tl.minimum(begin + ahead * step, pieces), step):
            place = words + (near + warp) * (4 * KEPT * 32)
            _prefetch(place, lane + tl.maximum(near + warp - pieces + 1, 0), KEPT * 512)
        tl.extra.cuda.gdc_wait()
    next_held = _activations(x, piece * 64 + lane % 16, piece < pieces, PAIRS)
    for first in range(begin, pieces, step):
        word = next_words
        held = next_held
        now = first + warp
        later = now + step
        next_words = _words(words + later * (4 * KEPT * 32), later < pieces, 4 * KEPT)
        next_held = _activations(x, later * 64 + lane % 16, later < pieces, PAIRS)
        group = now * 64 // GROUP
        own = _four_scales(tl.load(fours + group * 32, mask=now < pieces, other=0))
        new = ()
        if PAIRS == 0:
            part = (zero, zero, zero, zero)
            for slot in tl.static_range(4 * KEPT):
                part = tl.inline_asm_elementwise(
                    _FLOAT,
                    _FLOAT_REGISTERS,
                    [word[slot], held[slot // KEPT], part[0], part[1], part[2], part[3]],
                    dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                    is_pure=True,
                    pack=1,
                )
            for row in tl.static_range(4):
                new = new + (sums[row] + part[row] * own[row],)
        for pair in tl.static_range(PAIRS):
            part = (none, none, none, none)
            for slot in tl.static_range(4 * KEPT):
                x_pair = held[slot // KEPT * PAIRS + pair]
                part = tl.inline_asm_elementwise(
                    _HALF,
                    _HALF_REGISTERS,
                    [word[slot], x_pair, part[0], part[1], part[2], part[3]],
                    dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                    is_pure=True,
                    pack=1,
                )
            factor = factors + 2 * pair * pieces + now
            low_factor = tl.load(factor, mask=now < pieces, other=0.0)
            high_factor = tl.load(factor + pieces, mask=now < pieces, other=0.0)
            for row in tl.static_range(4):
                low, high = tl.inline_asm_elementwise(
                    _UNPACK, "=&f,=&f,r", [part[row]], (tl.float32, tl.float32), True, 1
                )
                low = sums[8 * pair + 2 * row] + low * (own[row] * low_factor)
                high = sums[8 * pair + 2 * row + 1] + high * (own[row] * high_factor)
                new = new + (low, high)
        sums = new
    if OVERLAP and GATED:
        # Not before: the product behind it, begun early, slows this one down (a step of the 31B
        # shape at one token 6.75 ms, then 6.37; an H100).
        tl.extra.cuda.gdc_launch_dependents()
    if PAIRS == 0:
        both = _rows_of(sums, 0, 1)
    elif PAIRS == 1:
        both = tl.join(_rows_of(sums, 0, 2), _rows_of(sums, 1, 2))
    else:
        low = tl.join(_rows_of(sums, 0, 2), _rows_of(sums, 8, 2))
        high = tl.join(_rows_of(sums, 1, 2), _rows_of(sums, 9, 2))
        both = tl.join(low, high)
    TOKENS: tl.constexpr = 2 * PAIRS if PAIRS else 1
    total = tl.sum(tl.reshape(both, [WARPS, _TILE, TOKENS]), 0) * 0.0625
    meet(
        y,
        total,
        residual,
        added,
        scale,
        partials,
        counters,
        tokens,
        rows,
        TOKENS=TOKENS,
        WARPS=WARPS,
        GROUPED=GROUPED,
        GATED=GATED,
    )


@triton.jit
def _power(largest):
    """Bits of the exponent of 2 that brings `largest` to 4 and below 8; at most 2^127."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    return tl.minimum(tl.maximum(256 - exponent, 1), 254)


@triton.jit
def _pairs(packed, factors, x, tokens, columns, PAIRS: tl.constexpr, OVERLAP: tl.constexpr):
    """x [tokens, K] as pairs of scaled halves, int32 [K, PAIRS], and what undoes the scaling."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    piece = tl.program_id(0)
    pair = tl.program_id(1)
    column = piece * 64 + tl.arange(0, 64)
    x += 2 * pair * columns
    low = tl.load(x + column).to(tl.float32)
    second = (2 * pair + 1 < tokens) & (column < columns)
    high = tl.load(x + columns + column, mask=second, other=0.0).to(tl.float32)
    low_power = _power(tl.max(tl.abs(low), 0))
    high_power = _power(tl.max(tl.abs(high), 0))
    low = (low * (low_power << 23).to(tl.float32, bitcast=True)).to(tl.float16)
    high = (high * (high_power << 23).to(tl.float32, bitcast=True)).to(tl.float16)
    low = low.to(tl.uint16, bitcast=True).to(tl.int32)
    high = high.to(tl.uint16, bitcast=True).to(tl.int32)
    tl.store(packed + column * PAIRS + pair, low | (high << 16))
    factors += 2 * pair * tl.num_programs(0) + piece
    tl.store(factors, ((254 - low_power) << 23).to(tl.float32, bitcast=True))
    inverse = ((254 - high_power) << 23).to(tl.float32, bitcast=True)
    tl.store(factors + tl.num_programs(0), inverse)


_MULTIPLES = ("columns",)
_SHARES = (
    *((0, 1, False), (0, 2, False), (0, 4, False), (1, 1, False), (1, 2, False), (1, 4, False)),
    *((2, 1, False), (2, 1, True)),
)
"""Pairs of tokens, warps, and whether sums are added in groups, that the bundle has."""
_GRID = "tiles, splits, copies"
_shuffled = Kernel(_sparse_gemv, grid=_GRID, multiples_of_16=_MULTIPLES)
_paired = Kernel(_pairs, name="token_pairs", grid="columns / 64, PAIRS", multiples_of_16=_MULTIPLES)


def variants() -> Iterator[Variant]:
    """What the bundle holds: the usual formats, bfloat16 in and out."""
    for overlap, targets in both_ways(NVIDIA):
        options = overlap_options(overlap)
        for pairs in (1, 2):
            types = ("*i32", "*fp32", "*bf16", "i32", "i32")
            constants = {"PAIRS": pairs, "OVERLAP": overlap}
            yield Variant(_paired, types, constants, 1, 1, targets, options)
        for format in filter(lambda each: supports(each, PIECE), SHIPPED):
            own = {"KEPT": format.kept, "GROUP": format.group}
            for (pairs, warps, together), gated in product(_SHARES, (False, True)):
                held = ("*i32", "*fp32") if pairs else ("*bf16", "none")
                types = ("*bf16", *held, *FEW_TYPES, "i32")
                constants = {
                    **{**own, "PAIRS": pairs, "WARPS": warps},
                    **{"OVERLAP": overlap, "GROUPED": together, "GATED": gated},
                }
                yield Variant(_shuffled, types, constants, warps, 1, targets, options)


def sparse_gemv(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None = None,
    scale: float = 1.0,
    experts: Tensor | None = None,
    gated: bool = False,
) -> None:
    """(x weight^T + residual) * scale of [tokens, K] into `out` [tokens, R].

    One to four tokens and one weight; or, with `experts` (int32 [tokens], each an index into the
    stack), any number of tokens, each by its own weight of the stack in one launch. `gated` takes
    rows 2i and 2i + 1 as a gate and its input: gelu(gate) * input, into [tokens, R/2]. All are
    contiguous, on one NVIDIA card and of one dtype (bfloat16, float16 or float32); results depend
    on no timing. Raises `KernelInputError` if something does not fit.
    """
    check_few(x, weight, out, residual, experts, gated)
    tokens, copies = (1, len(x)) if experts is not None else (len(x), 1)
    partials, counters = workspace(x.device)
    tensors = (
        *(weight.codes, weight.scales, out if residual is None else residual),
        *(counters if experts is None else experts, partials, counters),
    )
    numbers = (
        *(tokens, weight.rows, weight.columns),
        *(int(residual is not None), int(experts is not None), float(scale)),
    )
    pieces = weight.columns // PIECE
    own = {"KEPT": weight.format.kept, "GROUP": weight.format.group}
    overlap = overlaps_on(x)
    options = overlap_options(overlap)
    pairs = (0, 1, 2, 2)[tokens - 1]
    held, factors = x, None
    if pairs:
        held = torch.empty(weight.columns, pairs, dtype=torch.int32, device=x.device)
        factors = torch.empty(2 * pairs, pieces, dtype=torch.float32, device=x.device)
        _paired.launch(
            (pieces, pairs),
            *(held, factors, x, tokens, weight.columns),
            constants={"PAIRS": pairs, "OVERLAP": overlap},
            warps=1,
            stages=1,
            options=options,
        )
    padded = 2 * pairs or 1
    warps, splits, ahead = gemv_plan(x.device, weight.tiles, pieces, padded, copies)
    _shuffled.launch(
        (weight.tiles, splits, copies),
        *(out, held, factors, *tensors, *numbers, ahead),
        constants={
            **{**own, "PAIRS": pairs, "WARPS": warps, "OVERLAP": overlap},
            **{"GROUPED": in_groups(padded, splits), "GATED": gated},
        },
        warps=warps,
        stages=1,
        options=options,
    )
