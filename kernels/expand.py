"""A packed weight written out dense, for a matmul of many rows by the vendor's library.

output[r, k] = code[r, k] * scale[r, k / group], zero where nothing survived; any format of
`formats`, rounded once from float32. Reads the packed bytes once and writes each element once: 5:16
int4 to bfloat16 moves 0.33 + 2 bytes a weight. Meant for 256 rows of activations and more, into
scratch memory that the caller keeps: expanding then costs less than one matmul that decodes.

A program takes a tile of ROWS x COLUMNS. Packed tensors are read along the rows, the output is
written along the columns. What crosses over between threads, through shared memory, is still small:
the cells of 16 columns, shifted into place in one 64-bit word (4-bit values), two or four.

Where scales are whole numbers of a row's unit (`integer.weights`), a weight is written out as
integers of 8 bits as well.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .errors import KernelInputError
from .formats import SHIPPED, TILE, Format, PackedWeight, tensor_types
from .launching.launch import Kernel, Variant
from .launching.targets import HOPPER

ROWS, COLUMNS, WARPS = 64, 128, 4
_TILE = tl.constexpr(TILE)
ONE = 0x3F800000
"""The bits of 1.0 in float32."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _nibbles(words, one, PAIRED: tl.constexpr):
    """float32 [A, B, 8] of int32 words [A, B], whose nibbles hold value + 8 of an element each.

    In their order, or if PAIRED as dense int4 has them: elements 2i and 2i + 1 in nibbles i, i + 4.

    The nibble becomes mantissa bits of a float in [1, 2), from which one exact fused multiply-add
    makes the value. `one` is `ONE`, passed at run time: were it a constant beside the mask, the
    AND and the OR would be two instructions.
    """
    element = tl.arange(0, 8)
    nibble = element
    if PAIRED:
        nibble = element // 2 + element % 2 * 4
    shift = tl.where(nibble < 5, 0, 20)
    low = 4 * nibble - shift
    bits = ((words[:, :, None] >> shift) & (15 << low)) | one
    unit = ((150 - low) << 23).to(tl.float32, bitcast=True)
    return bits.to(tl.float32, bitcast=True) * unit - (unit + 8)


@triton.jit
def _write(output, values, scales, units, rows, columns, tiles, GROUP: tl.constexpr):
    """Scales and stores the tile `values` [ROWS, COLUMNS] of this program.

    Where there are units, by how many of its row's a scale is, a whole number.
    """
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(2).to(tl.int64)
    if GROUP:
        span = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS // 16) * 16
        tile = expert * tiles + tl.program_id(1) * ROWS // _TILE
        place = scales + tile * (columns // GROUP) * _TILE
        place = place + (span // GROUP)[None, :] * _TILE + (row % _TILE)[:, None]
        scale = tl.load(place, mask=span[None, :] < columns, other=0.0).to(tl.float32)
        if units is not None:
            unit = tl.load(units + row, mask=row < rows, other=0.0)[:, None]
            scale = tl.where(unit > 0, tl.floor(scale / unit + 0.5), 0.0)
        spans = tl.reshape(values, [ROWS, COLUMNS // 16, 16]) * scale[:, :, None]
        values = tl.reshape(spans, [ROWS, COLUMNS])
    start = (expert * rows + tl.program_id(1) * ROWS) * columns
    offset = tl.arange(0, ROWS)[:, None] * columns + column[None, :]
    fits = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(output + start + offset, values.to(output.dtype.element_ty), mask=fits)


@triton.jit
def _expand_sparse(
    output,
    codes,
    positions,
    scales,
    units,
    rows,
    columns,
    tiles,
    one,
    KEPT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    SPANS: tl.constexpr = COLUMNS // 16
    CELLS: tl.constexpr = 64 // BITS
    PAIRS: tl.constexpr = (KEPT + 1) // 2
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    tile = tl.program_id(2).to(tl.int64) * tiles + tl.program_id(1) * ROWS // _TILE
    at = tile * (columns // 16) + span[None, :]
    fits = span[None, :] * 16 < columns
    codes += at * KEPT * _TILE + row[:, None] % _TILE
    if BITS != 4:
        positions += at * PAIRS * _TILE + row[:, None] % _TILE
    zero = tl.zeros([ROWS, SPANS], tl.int64)
    word, word1, word2, word3 = zero, zero, zero, zero
    for slot in tl.static_range(KEPT):
        code = tl.load(codes + slot * _TILE, mask=fits, other=0)
        if BITS == 4:
            place = code.to(tl.int32) & 15
            value = (code.to(tl.int32) >> 4).to(tl.int64)
        else:
            if slot % 2 == 0:
                pair = tl.load(positions + slot // 2 * _TILE, mask=fits, other=0).to(tl.int32)
            place = (pair >> (slot % 2 * 4)) & 15
            if BITS == 8:
                value = code.to(tl.int64) & 0xFF
            else:
                value = code.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
        cell = value << (place % CELLS * BITS).to(tl.int64)
        if BITS == 4:
            word |= cell
        else:
            word |= tl.where(place // CELLS == 0, cell, zero)
            word1 |= tl.where(place // CELLS == 1, cell, zero)
        if BITS == 16:
            word2 |= tl.where(place // CELLS == 2, cell, zero)
            word3 |= tl.where(place // CELLS == 3, cell, zero)
    if BITS == 4:
        # To value + 8: flips the sign bit of each nibble.
        word ^= -0x7777777777777778
        halves = (word[:, :, None] >> (tl.arange(0, 2) * 32).to(tl.int64)).to(tl.int32)
        values = _nibbles(tl.reshape(halves, [ROWS, SPANS * 2]), one, False)
    else:
        if BITS == 8:
            words = tl.reshape(tl.join(word, word1), [ROWS, SPANS * 2])
        else:
            quads = tl.join(tl.join(word, word2), tl.join(word1, word3))
            words = tl.reshape(quads, [ROWS, SPANS * 4])
        cells = words[:, :, None] >> (tl.arange(0, CELLS) * BITS).to(tl.int64)
        if BITS == 8:
            values = cells.to(tl.int8).to(tl.float32)
        else:
            values = cells.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    values = tl.reshape(values, [ROWS, COLUMNS])
    _write(output, values, scales, units, rows, columns, tiles, GROUP)


@triton.jit
def _expand_dense(
    output,
    codes,
    scales,
    units,
    rows,
    columns,
    tiles,
    one,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    EACH: tl.constexpr = 8 if BITS == 4 else 1
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    line = tl.program_id(0) * (COLUMNS // EACH) + tl.arange(0, COLUMNS // EACH)
    tile = tl.program_id(2).to(tl.int64) * tiles + tl.program_id(1) * ROWS // _TILE
    place = (tile * (columns // EACH) + line[None, :]) * _TILE + row[:, None] % _TILE
    fits = line[None, :] * EACH < columns
    code = tl.load(codes + place, fits, other=0)
    if BITS == 4:
        values = tl.reshape(_nibbles(code, one, True), [ROWS, COLUMNS])
    else:
        values = code.to(tl.float32)
    _write(output, values, scales, units, rows, columns, tiles, GROUP)


_GRID = "cdiv(columns, COLUMNS), cdiv(rows, ROWS), experts"
_sparse = Kernel(_expand_sparse, grid=_GRID, multiples_of_16=("columns",))
_dense = Kernel(_expand_dense, grid=_GRID, multiples_of_16=("columns",))


def _plan(format: Format) -> tuple[Kernel, dict[str, int]]:
    """The kernel of a format and its constants."""
    constants = {"BITS": format.bits, "GROUP": format.group, "ROWS": ROWS, "COLUMNS": COLUMNS}
    if format.dense:
        return _dense, constants
    return _sparse, {"KEPT": format.kept, **constants}


def variants() -> Iterator[Variant]:
    """What the bundle holds: the usual formats, to bfloat16, and those of 4 bits to integers."""
    for format in SHIPPED:
        kernel, constants = _plan(format)
        types = tensor_types(format)
        yield Variant(kernel, ("*bf16", *types, "none", *["i32"] * 4), constants, warps=WARPS)
        if format.bits == 4:
            types = ["*i8", *types, "*fp32", *["i32"] * 4]
            yield Variant(kernel, tuple(types), constants, warps=WARPS, targets=HOPPER)


def expand(
    weight: PackedWeight, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The dense weight [E?, R, K], row-major, in `out` (its dtype counts) or a new tensor.

    Equals `layouts.unpack`. KernelInputError if `out` is not contiguous, not aligned to 16 bytes,
    on another device, or of another shape or dtype than bfloat16, float16 and float32.
    """
    shape = weight.shape
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=weight.device)
    if tuple(out.shape) != shape or out.dtype not in _DTYPES or not out.is_contiguous():
        raise KernelInputError(
            f"out is {out.dtype} {tuple(out.shape)}; it must be contiguous {shape} of one of "
            f"{', '.join(map(str, _DTYPES))}"
        )
    _launch(weight, out, None)
    return out


def expand_integers(weight: PackedWeight, units: Tensor, out: Tensor) -> None:
    """Integers [R, K] of a single weight with whole scales (`integer.weights`) into `out`.

    Integer times unit of its row is the weight. `units` is float32 [R or more], `out` int8,
    contiguous.
    """
    if tuple(out.shape) != weight.shape or out.dtype != torch.int8 or not out.is_contiguous():
        raise KernelInputError(
            f"out is {out.dtype} {tuple(out.shape)}; it must be contiguous int8 {weight.shape}"
        )
    if weight.format.bits != 4 or len(units) < weight.rows:
        raise KernelInputError(
            f"the weight is {weight.format} and has {weight.rows} rows; it must be of 4 bits, "
            f"with a unit for each row, not {len(units)}"
        )
    _launch(weight, out, units)


def _launch(weight: PackedWeight, out: Tensor, units: Tensor | None) -> None:
    kernel, constants = _plan(weight.format)
    tensors = [weight.codes, weight.scales]
    if not weight.format.dense:
        tensors.insert(1, weight.positions)
    grid = (-(-weight.columns // COLUMNS), -(-weight.rows // ROWS), weight.experts or 1)
    sizes = (weight.rows, weight.columns, weight.tiles, ONE)
    kernel.launch(grid, out, *tensors, units, *sizes, constants=constants, warps=WARPS)
