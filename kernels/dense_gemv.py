"""One to four tokens times a dense int4 or int8 weight: y[m, r] = sum of x[m, k] * code * scale.

As in `sparse_gemv` the time is that of reading the weight, in plain Triton for all processors: a
program has one tile of 128 rows and every `splits`-th piece along K, 4 KiB of codes; its warps take
pieces side by side, and the programs' sums meet as told in `workspace`.

The two halves of a warp take a line of columns each (32 of int4, 16 of int8), and a lane eight
rows: it reads x, and makes float32 of it, once for eight rows, not for four. The codes of the next
piece are loaded before this one is computed.

A code becomes a float by an AND-XOR into the mantissa of a power of two, from which one exact
subtraction leaves the value (int8's own conversion is a slow instruction). On an H100 that takes
3.8, 5.0 and 7.2 instructions for a weight of int4 at 1, 2 and 4 tokens, all told, and 4.5, 5.8 and
8.0 of int8; 122 to 168 registers.
"""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from .formats import TILE, Format, PackedWeight
from .launching.launch import Kernel, Variant
from .launching.overlap import both_ways, overlap_options, overlaps_on
from .sparse_gather import FEW_TYPES, check_few
from .tuning import dense_plan
from .workspace import in_groups, meet, workspace

_TILE = tl.constexpr(TILE)
_LARGE = 0x4B000000
"""The bits of 2^23 in float32."""


@triton.jit
def _words(place, fits, WIDTH: tl.constexpr):
    """The 2 KiB of a line of columns, WIDTH words at a time."""
    words = ()
    for part in tl.static_range(512 // WIDTH):
        word = tl.load(place + part * WIDTH, mask=fits, other=0, eviction_policy="evict_first")
        words = words + (word,)
    return words


@triton.jit
def _four_floats(word):
    """float32 of the four bfloat16 of an int64."""
    low = word.to(tl.int32)
    high = (word >> 32).to(tl.int32)
    return (
        (low << 16).to(tl.float32, bitcast=True),
        ((low >> 16) << 16).to(tl.float32, bitcast=True),
        (high << 16).to(tl.float32, bitcast=True),
        ((high >> 16) << 16).to(tl.float32, bitcast=True),
    )


@triton.jit
def _activations(x, COUNT: tl.constexpr):
    """float32 of COUNT columns of one token."""
    held = ()
    if x.dtype.element_ty == tl.bfloat16:
        wide = x.to(tl.pointer_type(tl.int64))
        for four in tl.static_range(COUNT // 4):
            held = held + _four_floats(tl.load(wide + four))
    else:
        for column in tl.static_range(COUNT):
            held = held + (tl.load(x + column).to(tl.float32),)
    return held


@triton.jit
def _value(word, large, SHIFT: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr):
    """float32 of the code at bit SHIFT + LOW: offset by 8 (4 bits), or signed (8 bits).

    `large` is `_LARGE`, passed at run time: were it a constant beside the mask, the AND and the XOR
    would be two instructions.
    """
    HALF: tl.constexpr = 1 << (BITS - 1)
    field = (word >> SHIFT) & ((2 * HALF - 1) << LOW)
    if BITS == 4:
        bits = field | (large - (LOW << 23))
    else:
        bits = field ^ (large + ((HALF << LOW) - (LOW << 23)))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - LOW)) + HALF)


@triton.jit
def _values(words, column: tl.constexpr, large, BITS: tl.constexpr):
    """One column of a line: of int4 rows 0 to 63 and 64 to 127, of int8 each fourth row.

    Fields that would reach beyond the mantissa are shifted: to bit 4 or higher, as a field at bit 0
    would be cut out by two instructions.
    """
    values = ()
    if BITS == 4:
        PAIR: tl.constexpr = column % 8 // 2
        for part in tl.static_range(2):
            word = words[column // 8 * 2 + part]
            if column % 2 == 0:
                value = _value(word, large, 0, 4 * PAIR, 4)
            elif PAIR == 0:
                value = _value(word, large, 0, 16, 4)
            else:
                value = _value(word, large, 16, 4 * PAIR, 4)
            values = values + (value,)
    else:
        for byte in tl.static_range(4):
            shift = byte // 2 * 12
            values = values + (_value(words[column], large, shift, 8 * byte - shift, 8),)
    return values


@triton.jit
def _scales(scales, index, row, fits, BITS: tl.constexpr):
    """float32 scales of the rows as `_values` has them."""
    if BITS == 4:
        place = scales + index * _TILE + row
        low = tl.load(place, mask=fits, other=0.0).to(tl.float32)
        high = tl.load(place + _TILE // 2, mask=fits, other=0.0).to(tl.float32)
        own = (low, high)
    else:
        wide = scales.to(tl.pointer_type(tl.int64)) + index * (_TILE // 4) + row
        own = _four_floats(tl.load(wide, mask=fits, other=0))
    return own


@triton.jit
def _all(sums):
    """[WARPS, 2, WIDTH] added up to [WIDTH]."""
    return tl.sum(tl.sum(sums, 1), 0)


@triton.jit
def _token(sums, TOKEN: tl.constexpr, BITS: tl.constexpr):
    """The sums of one token [128], in the order of the rows."""
    if BITS == 4:
        halves = tl.join(_all(sums[2 * TOKEN]), _all(sums[2 * TOKEN + 1]))
        total = tl.reshape(tl.permute(halves, (1, 0)), [_TILE])
    else:
        even = tl.join(_all(sums[4 * TOKEN]), _all(sums[4 * TOKEN + 2]))
        odd = tl.join(_all(sums[4 * TOKEN + 1]), _all(sums[4 * TOKEN + 3]))
        total = tl.reshape(tl.join(even, odd), [_TILE])
    return total


@triton.jit
def _dense_gemv(
    y,
    x,
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
    shared,
    large,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
    GROUPED: tl.constexpr,
    GATED: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    LINE: tl.constexpr = 128 // BITS
    WIDTH: tl.constexpr = 64 if BITS == 4 else 32
    PARTS: tl.constexpr = 2 if BITS == 4 else 4
    CHUNK: tl.constexpr = LINE if TOKENS < 4 else 4
    row = tl.arange(0, WIDTH)[None, None, :]
    half = tl.arange(0, 2)[None, :, None]
    warp = tl.arange(0, WARPS)[:, None, None]
    step = tl.num_programs(1) * WARPS
    tile = tl.program_id(0).to(tl.int64)
    if grouped > 0:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        tile += tl.load(experts + tl.program_id(2)) * tl.num_programs(0)
        x += tl.program_id(2) * columns
    lines = columns // LINE
    words = codes.to(tl.pointer_type(tl.int32)) + tile * (lines * 512) + row
    scales += tile * ((lines >> shared) * _TILE)
    zero = tl.zeros([WARPS, 2, WIDTH], tl.float32)
    sums = ()
    for _ in tl.static_range(TOKENS * PARTS):
        sums = sums + (zero,)
    start = tl.program_id(1) * WARPS
    line = (start + warp) * 2 + half
    next_words = _words(words + line * 512, line < lines, WIDTH)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for first in range(start, (lines + 1) // 2, step):
        word = next_words
        line = (first + warp) * 2 + half
        later = line + step * 2
        # Beyond the last line there are codes and scales of zero; x may be any.
        column = tl.minimum(line, lines - 1) * LINE
        if OVERLAP:
            next_words = _words(words + later * 512, later < lines, WIDTH)
            if TOKENS < 4:
                # Else, to save registers, these loads are moved behind all that follows.
                tl.debug_barrier()
        own = _scales(scales, line >> shared, row, line < lines, BITS)
        part = ()
        for _ in tl.static_range(TOKENS * PARTS):
            part = part + (zero,)
        for i in tl.static_range(LINE):
            if i % CHUNK == 0:
                held = ()
                for token in tl.static_range(TOKENS):
                    own_x = x + tl.minimum(token, tokens - 1) * columns
                    held = held + _activations(own_x + column + i, CHUNK)
            if i == 0 and not OVERLAP:
                # After x, as AMD's cards wait for loads in their order.
                next_words = _words(words + later * 512, later < lines, WIDTH)
            values = _values(word, i, large, BITS)
            new = ()
            for n in tl.static_range(TOKENS * PARTS):
                new = new + (part[n] + values[n % PARTS] * held[n // PARTS * CHUNK + i % CHUNK],)
            part = new
        new = ()
        for n in tl.static_range(TOKENS * PARTS):
            new = new + (sums[n] + part[n] * own[n % PARTS],)
        sums = new
    if TOKENS == 1:
        total = _token(sums, 0, BITS)[:, None]
    elif TOKENS == 2:
        total = tl.join(_token(sums, 0, BITS), _token(sums, 1, BITS))
    else:
        low = tl.join(_token(sums, 0, BITS), _token(sums, 2, BITS))
        high = tl.join(_token(sums, 1, BITS), _token(sums, 3, BITS))
        total = tl.reshape(tl.join(low, high), [_TILE, 4])
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


_SHARES = ((1, 4, False), (2, 4, False), (4, 1, False), (4, 1, True))
"""Tokens, warps, and whether sums are added in groups, that the bundle has."""
_gemv = Kernel(_dense_gemv, grid="tiles, splits, copies", multiples_of_16=("columns",))


def supports(format: Format, columns: int) -> bool:
    """Whether the kernel takes weights of this format."""
    return format.dense


def variants() -> Iterator[Variant]:
    """What the bundle holds: the usual formats, bfloat16 in and out."""
    for bits, (tokens, warps, together), gated in product((4, 8), _SHARES, (False, True)):
        types = ("*bf16", "*bf16", "*i32" if bits == 4 else "*i8", *FEW_TYPES[1:], "i32", "i32")
        for overlap, targets in both_ways():
            constants = {
                **{"BITS": bits, "TOKENS": tokens, "WARPS": warps},
                **{"OVERLAP": overlap, "GROUPED": together, "GATED": gated},
            }
            yield Variant(_gemv, types, constants, warps, 1, targets, _options(overlap))


def _options(overlap: bool) -> dict[str, int]:
    """Where nothing overlaps, AMD's: the compiler is to leave registers for two warps at least."""
    return overlap_options(True) if overlap else {"waves_per_eu": 2}


def dense_gemv(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    residual: Tensor | None = None,
    scale: float = 1.0,
    experts: Tensor | None = None,
    gated: bool = False,
) -> None:
    """As `sparse_gemv.sparse_gemv` of a dense weight, on any card, and on the CPU interpreted."""
    check_few(x, weight, out, residual, experts, gated, dense=True)
    tokens, copies = (1, len(x)) if experts is not None else (len(x), 1)
    padded = 1 << (tokens - 1).bit_length()
    bits = weight.format.bits
    line = 128 // bits
    pieces = -(-weight.columns // (2 * line))
    warps, splits = dense_plan(x.device, bits, weight.tiles, pieces, padded, copies)
    overlap = overlaps_on(x)
    partials, counters = workspace(x.device)
    tensors = (
        *(weight.codes, weight.scales, out if residual is None else residual),
        *(counters if experts is None else experts, partials, counters),
    )
    numbers = (
        *(tokens, weight.rows, weight.columns),
        *(int(residual is not None), int(experts is not None), float(scale)),
        *((weight.format.group // line).bit_length() - 1, _LARGE),
    )
    _gemv.launch(
        (weight.tiles, splits, copies),
        *(out, x, *tensors, *numbers),
        constants={
            **{"BITS": bits, "TOKENS": padded, "WARPS": warps},
            **{"OVERLAP": overlap, "GROUPED": in_groups(padded, splits), "GATED": gated},
        },
        warps=warps,
        stages=1,
        options=_options(overlap),
    )
