"""Weights into their formats and back: pack, unpack, the map of survivors, the check before use.

Plain torch on whatever device the tensors are on, a bounded number of rows at a time: a matrix of
100 million weights is never expanded twice. Which byte goes where is told in `formats`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import KernelInputError, LayoutError
from .formats import (
    SPAN,
    TILE,
    Format,
    PackedWeight,
    Shape,
    from_tensors,
    packed_bytes,
    tensor_shapes,
)

__all__ = [
    "Format",
    "PackedWeight",
    "codes_of",
    "mask_of",
    "pack",
    "pack_codes",
    "packed_bytes",
    "rows_at",
    "scales_of",
    "unpack",
    "validate",
]

BLOCK_WEIGHTS = 1 << 22
"""Weights packed or unpacked at a time: some 100 MB of temporaries, whatever the matrix."""


def pack(
    weight: Tensor, format: Format, mask: Tensor | None = None, scales: Tensor | None = None
) -> PackedWeight:
    """`weight` [R, K] or [E, R, K] (floating) in `format`, on the weight's device.

    `mask` (bool, the weight's shape) tells which weights survive, at most `kept` of each 16;
    without it the largest magnitudes do. `scales` [E?, K/group, R], or as they are stored, are
    rounded to bfloat16; without them each is the better of absmax/limit and absmax/(limit + 1) by
    squared error. Packing what `unpack` gives, with its `mask_of` and its scales, gives the same
    bytes. No gradient goes through. LayoutError if something does not fit, survivors that bfloat16
    would round to infinity among it.
    """
    if weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise LayoutError(
            f"a weight is a floating [R, K] or [E, R, K], not {weight.dtype} {tuple(weight.shape)}"
        )
    weight = weight.detach()
    rows, columns = weight.shape[-2:]
    experts = weight.shape[0] if weight.dim() == 3 else None
    shapes = tensor_shapes(format, rows, columns, experts)
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise LayoutError(
            f"the mask is {mask.dtype} {tuple(mask.shape)}; it must be bool {tuple(weight.shape)}"
        )
    if scales is not None:
        scales = _padded_scales(scales, shapes, format, rows)
    tensors = {
        name: torch.empty(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in shapes.items()
    }
    packed = from_tensors(format, rows, columns, tensors)
    for part, first, last in _blocks(packed):
        index = slice(None) if experts is None else part
        block = _rows_of(weight[index], first, last).float()
        if not bool(block.isfinite().all()):
            raise LayoutError(f"rows {first} to {last} of the weight hold NaN or infinity")
        survivors = None if mask is None else _rows_of(mask[index], first, last)
        tiles = slice(first // TILE, last // TILE)
        given = None if scales is None else _flat(scales[index][tiles]).to(weight.device)
        for name, values in _pack_block(block, format, survivors, given).items():
            tensors[name][index][tiles] = _tiled(values)
    return packed


def pack_codes(
    codes: Tensor, format: Format, scales: Tensor, mask: Tensor | None = None
) -> PackedWeight:
    """The inverse of `codes_of` (int8 [E?, R, K]), `scales_of` (bfloat16 [E?, R, K/group]) and
    `mask_of`: as `pack`, but not a bit of a code or scale changes, be the scale zero or huge.

    Codes are in the range of the format, which is an integer one, and zero where `mask` is false.
    """
    ones = torch.ones_like(scales.transpose(-1, -2))
    packed = pack(codes.bfloat16(), format, mask, ones)
    shapes = tensor_shapes(format, packed.rows, packed.columns, packed.experts)
    own = _padded_scales(scales.transpose(-1, -2), shapes, format, packed.rows)
    return replace(packed, scales=own.contiguous())


def codes_of(packed: PackedWeight) -> Tensor:
    """The codes of an integer format, int8 [E?, R, K]; zero where no weight survives.

    LayoutError of a bfloat16 format, as with `scales_of`.
    """
    _scales(packed)
    return _dense(packed, torch.int8, _codes)


def scales_of(packed: PackedWeight) -> Tensor:
    """The scales of an integer format as they are stored, bfloat16 [E?, R, K/group]."""
    rows: Tensor = _scales(packed).transpose(-1, -2).flatten(-3, -2)
    return rows[..., : packed.rows, :].contiguous()


def unpack(
    packed: PackedWeight, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """The dense weight [E?, R, K]: code * scale in float32, then rounded to `dtype`.

    Into `out`, if it is given, in whose dtype and strides a few rows are written at a time.
    KernelInputError if it has another shape.
    """
    if out is not None and tuple(out.shape) != packed.shape:
        raise KernelInputError(f"out is {tuple(out.shape)}; it must be {packed.shape}")
    return _dense(packed, dtype, _values, out)


def rows_at(packed: PackedWeight, index: Tensor) -> Tensor:
    """float32 [n, K]: rows of a single weight by their numbers (int64 [n]); no others are read.

    KernelInputError if the weight is a stack, or `index` has another number of dimensions.
    """
    if packed.experts is not None or index.dim() != 1:
        raise KernelInputError(
            f"index is {tuple(index.shape)} of {'a stack' if packed.experts else 'a single weight'}"
            "; it must be [n] of a single weight"
        )
    tile, lane = index // TILE, index % TILE
    tensors = {
        name: tensor.movedim(-1, 1)[tile, lane].movedim(0, -1)
        for name, tensor in packed.tensors().items()
    }
    return _values(from_tensors(packed.format, index.shape[0], packed.columns, tensors))


def mask_of(packed: PackedWeight) -> Tensor:
    """Which weights have a slot, bool [E?, R, K]: all in a dense format, else N of each 16."""
    return _dense(packed, torch.bool, _slots)


def validate(packed: PackedWeight) -> None:
    """LayoutError, which names the field, unless `packed` is what kernels may be given.

    Reads positions, scales and bfloat16 values, so it waits for the device: for loading, not for
    each step.
    """
    shapes = tensor_shapes(packed.format, packed.rows, packed.columns, packed.experts)
    tensors = packed.tensors()
    if tensors.keys() != shapes.keys():
        raise LayoutError(f"{packed.format} has {sorted(shapes)}, not {sorted(tensors)}")
    for name, (shape, dtype) in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise LayoutError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; {packed.format} of "
                f"{packed.rows} x {packed.columns} has {dtype} {shape}"
            )
        if tensor.device != packed.device:
            raise LayoutError(f"{name} is on {tensor.device}, codes on {packed.device}; move it")
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise LayoutError(f"{name} is not contiguous or not 16-byte aligned; clone it")
    if packed.scales is not None:
        _check_scales(packed.scales)
    if not packed.format.dense:
        for part, first, last in _blocks(packed):
            codes, positions = _survivors(_slice(packed, part, first, last))
            if packed.format.bits == 16 and not bool(codes.isfinite().all()):
                raise LayoutError("codes: values must be finite")
            if not bool((positions[:, 1:] > positions[:, :-1]).all()):
                field = "codes" if packed.positions is None else "positions"
                raise LayoutError(f"{field}: positions of a group must be distinct and ascend")


def _scales(packed: PackedWeight) -> Tensor:
    """As they lie; LayoutError if there are none."""
    if packed.scales is None:
        raise LayoutError(f"{packed.format} has values, no codes and scales; `unpack` gives them")
    return packed.scales


def _check_scales(scales: Tensor) -> None:
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise LayoutError("scales must be finite and not negative")


def _padded_scales(
    scales: Tensor, shapes: dict[str, tuple[Shape, torch.dtype]], format: Format, rows: int
) -> Tensor:
    """Given scales as they are stored."""
    if "scales" not in shapes:
        raise LayoutError(f"{format} has no scales; leave them out")
    wanted, dtype = shapes["scales"]
    stored = scales.detach().to(dtype)
    *stack, tiles, groups, width = wanted
    if tuple(scales.shape) == (*stack, groups, rows):
        stored = _tiled(F.pad(stored, (0, tiles * width - rows))).movedim(0, len(stack))
    if tuple(stored.shape) != wanted:
        raise LayoutError(f"the scales are {tuple(scales.shape)}; they must be {wanted}")
    _check_scales(stored)
    return stored


def _blocks(packed: PackedWeight) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of all padded rows, in blocks of a bounded size."""
    step = max(TILE, BLOCK_WEIGHTS // packed.columns // TILE * TILE)
    end = packed.tiles * TILE
    for part in range(packed.experts or 1):
        for first in range(0, end, step):
            yield part, first, min(first + step, end)


def _tiled(values: Tensor) -> Tensor:
    """[T, ..., 128] of values with all rows last, [..., R']."""
    tiles: Tensor = values.unflatten(-1, (-1, TILE))
    return tiles.movedim(-2, 0)


def _flat(tiles: Tensor) -> Tensor:
    """[..., R'], the inverse of `_tiled`."""
    return tiles.movedim(0, -2).flatten(-2)


def _rows_of(matrix: Tensor, first: int, last: int) -> Tensor:
    """Rows of a matrix [R, K]; zeros behind its end."""
    rows = matrix[first:last]
    return F.pad(rows, (0, 0, 0, last - first - rows.shape[0]))


def _slice(packed: PackedWeight, part: int, first: int, last: int) -> PackedWeight:
    """Rows of one expert, from the first of a tile, with all rows last: [..., last - first]."""
    single = packed if packed.experts is None else packed.expert(part)
    tiles = slice(first // TILE, last // TILE)
    tensors = {name: _flat(tensor[tiles]) for name, tensor in single.tensors().items()}
    return from_tensors(packed.format, last - first, packed.columns, tensors)


def _pack_block(
    block: Tensor, format: Format, mask: Tensor | None, scales: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of the float32 `block` [r, K]; `scales` are [K/group, r]."""
    slots = None
    if mask is not None:
        block = torch.where(mask, block, 0.0)
    if not format.dense:
        slots = _choose(block if mask is None else mask, format.kept)
        block = torch.where(slots, block, 0.0)
        if mask is not None and not bool((mask <= slots).all()):
            raise LayoutError(f"the mask keeps more than {format.kept} of 16 columns; {format}")
    tensors = {}
    codes = block.bfloat16()
    if not format.group and not bool(codes.isfinite().all()):
        raise LayoutError("the weight has values that bfloat16 rounds to infinity; scale it down")
    if format.group:
        grouped = block.unflatten(1, (-1, format.group))
        chosen = _best_scales(grouped, format.bits) if scales is None else scales.T.float()
        tensors["scales"] = chosen.T.bfloat16()
        codes = _quantize(grouped, chosen, format.bits).flatten(1).to(torch.int8)
    if slots is None:
        tensors["codes"] = (_words(codes + 8) if format.bits == 4 else codes).T
        return tensors
    shape = (block.shape[0], -1, format.kept)
    numbers = torch.arange(block.shape[1], device=block.device) % SPAN
    positions = numbers.to(torch.uint8).expand_as(slots)[slots].view(shape).permute(1, 2, 0)
    kept = codes[slots].view(shape).permute(1, 2, 0)
    if format.bits == 4:
        tensors["codes"] = (kept.view(torch.uint8) << 4) | positions
    else:
        tensors["codes"] = kept
        even = F.pad(positions.transpose(1, 2), (0, format.kept % 2))
        tensors["positions"] = _join_nibbles(even).transpose(1, 2)
    return tensors


def _choose(strength: Tensor, kept: int) -> Tensor:
    """bool [r, K] with exactly `kept` of each 16: the strongest, then the first of those alike."""
    groups = strength.abs() if strength.is_floating_point() else strength.to(torch.uint8)
    order = groups.unflatten(1, (-1, SPAN)).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros(order.shape, dtype=torch.bool, device=strength.device)
    chosen.scatter_(-1, order[..., :kept], True)
    return chosen.flatten(1)


def _best_scales(grouped: Tensor, bits: int) -> Tensor:
    """float32 [r, K/group] of bfloat16 values for weights [r, K/group, group]."""
    limit = 2 ** (bits - 1) - 1
    largest = grouped.abs().amax(-1)
    # A step more clips the largest but is finer for all others: at 4 bits it often wins.
    wide, fine = ((largest / steps).bfloat16().float() for steps in (limit, limit + 1))
    wide_error, fine_error = (
        (_quantize(grouped, scales, bits) * scales[..., None] - grouped).square().sum(-1)
        for scales in (wide, fine)
    )
    return torch.where(fine_error < wide_error, fine, wide)


def _quantize(grouped: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Integers, as float32, nearest to weights [r, K/group, group] over scales [r, K/group]."""
    steps = grouped / torch.where(scales > 0, scales, 1.0)[..., None]
    limit = 2 ** (bits - 1)
    return steps.round_().clamp_(-limit, limit - 1).masked_fill_(scales[..., None] == 0, 0.0)


def _join_nibbles(values: Tensor) -> Tensor:
    """uint8 [..., n/2] from small integers [..., n]: even ones low, odd ones high."""
    pairs = values.to(torch.uint8).unflatten(-1, (-1, 2))
    joined: Tensor = pairs[..., 0] | (pairs[..., 1] << 4)
    return joined


def _split_nibbles(joined: Tensor) -> Tensor:
    """uint8 [..., 2n] from uint8 [..., n], the inverse of `_join_nibbles`."""
    return torch.stack((joined & 15, joined >> 4), dim=-1).flatten(-2)


def _words(values: Tensor) -> Tensor:
    """int32 [..., n/8] from small integers [..., n], as dense int4 has them."""
    apart = values.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)
    return _join_nibbles(apart).view(torch.int32)


def _of_words(words: Tensor) -> Tensor:
    """uint8 [..., 8n] from int32 [..., n], the inverse of `_words`."""
    nibbles: Tensor = _split_nibbles(words.contiguous().view(torch.uint8))
    apart: Tensor = nibbles.unflatten(-1, (-1, 2, 4))
    return apart.transpose(-1, -2).flatten(-3)


def _survivors(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Codes and positions (uint8) of sparse rows as of `_slice`, both [K/16, N, r]."""
    if packed.positions is None:
        return packed.codes.view(torch.int8) >> 4, packed.codes & 15
    positions = _split_nibbles(packed.positions.transpose(1, 2)).transpose(1, 2)
    return packed.codes, positions[:, : packed.format.kept]


def _dense(
    packed: PackedWeight,
    dtype: torch.dtype,
    read: Callable[[PackedWeight], Tensor],
    output: Tensor | None = None,
) -> Tensor:
    """[E?, R, K] of what `read` makes of a few rows of a single weight, [r, K]."""
    if output is None:
        output = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    for part, first, last in _blocks(packed):
        target = (output if packed.experts is None else output[part])[first:last]
        target.copy_(read(_slice(packed, part, first, last))[: target.shape[0]])
    return output


def _codes(packed: PackedWeight) -> Tensor:
    """float32 [r, K] of rows as of `_slice`."""
    if not packed.format.dense:
        codes, positions = _survivors(packed)
        return _spread(codes.float(), positions)
    if packed.format.bits == 4:
        return _of_words(packed.codes.T).float() - 8
    return packed.codes.T.float()


def _values(packed: PackedWeight) -> Tensor:
    """float32 [r, K] of rows as of `_slice`."""
    values = _codes(packed)
    if packed.scales is None:
        return values
    grouped: Tensor = values.unflatten(1, (-1, packed.format.group))
    return grouped.mul_(packed.scales.T.float()[..., None]).view(values.shape)


def _slots(packed: PackedWeight) -> Tensor:
    """bool [r, K] of rows as of `_slice`."""
    if packed.format.dense:
        shape = (packed.rows, packed.columns)
        return torch.ones(shape, dtype=torch.bool, device=packed.device)
    _, positions = _survivors(packed)
    return _spread(torch.ones_like(positions, dtype=torch.bool), positions)


def _spread(values: Tensor, positions: Tensor) -> Tensor:
    """[r, K] with `values` [K/16, N, r] at their positions and zeros between them."""
    groups, _, rows = values.shape
    spread = torch.zeros(rows, groups, SPAN, dtype=values.dtype, device=values.device)
    spread.scatter_(-1, positions.permute(2, 0, 1).long(), values.permute(2, 0, 1))
    return spread.flatten(1)
