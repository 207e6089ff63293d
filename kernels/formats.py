"""The formats of compressed weights: what one keeps, how its tensors lie, what they take.

A weight [R rows out, K columns in] is cut into groups of 16 columns. A sparse format N:16 keeps N
of each 16; a dense one keeps all. Kept values are codes: weight = code * scale, with one bfloat16
scale for `group` columns of a row. Rows come in tiles of 128: a tile of every tensor is contiguous,
and in it rows are last, so that 32 lanes with four rows each read 128 adjacent bytes of a slot, and
the next slot is at a distance that the compiler knows. R' is R rounded up to whole tiles; the rows
between are zero. Stacked weights (experts) have one leading dimension E on every tensor. With T for
R'/128:

| format     | codes                       | positions                        | scales         |
| ---------- | --------------------------- | -------------------------------- | -------------- |
| N:16 int4  | uint8 [T, K/16, N, 128] (1) |                                  | bfloat16 (4)   |
| N:16 int8  | int8 [T, K/16, N, 128]      | uint8 [T, K/16, N/2 up, 128] (2) | bfloat16 (4)   |
| N:16 bf16  | bfloat16 [T, K/16, N, 128]  | uint8 [T, K/16, N/2 up, 128] (2) |                |
| dense int4 | int32 [T, K/8, 128] (3)     |                                  | bfloat16 (4)   |
| dense int8 | int8 [T, K, 128]            |                                  | bfloat16 (4)   |

(1) One byte a survivor: signed value (-8..7) in the high nibble, position (0..15) in the low one.
(2) N/2 rounded up: survivor 2i in the low nibble, 2i + 1 in the high one, one too many is zero.
(3) Bits 4i to 4i + 3 of word j hold value + 8 of column 8j + 2 (i % 4) + i / 4: neighbours lie 16
    bits apart, where one instruction makes two numbers of 16 bits.
(4) [T, K/group, 128].

The positions of a group are distinct and ascend. A group with fewer than N survivors fills its
slots with the value zero at the lowest free positions, so the bytes follow from values and map.
"""

import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .errors import LayoutError

SPAN = 16
"""Columns that N survivors are chosen from."""
TILE = 128
"""Rows that lie together."""
GROUPS = (32, 64, 128)
"""Columns that can share a scale."""

_FORMAT = re.compile(r"(?:([0-9]{1,2}):16|dense)-(?:int([0-9]{1,2})-g([0-9]{1,3})|bf16)")


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight; printed and parsed as "5:16-int4-g128", "dense-int8-g64", ..."""

    kept: int
    """Survivors of each 16 columns: 1 to 15, or 16 in a dense format."""
    bits: int
    """Of a value: 4 or 8 (integers with scales), or 16 (exact bfloat16, sparse formats only)."""
    group: int
    """Columns that share a scale: 32, 64 or 128; 0 if `bits` is 16."""

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= SPAN:
            raise LayoutError(f"kept is {self.kept}; choose 1 to 15 of 16, or 16 for dense")
        if self.bits not in (4, 8, 16):
            raise LayoutError(f"bits is {self.bits}; choose 4, 8 or 16")
        if self.bits == 16 and self.dense:
            raise LayoutError("dense bf16 is no format of its own; keep the plain tensor")
        groups = (0,) if self.bits == 16 else GROUPS
        if self.group not in groups:
            raise LayoutError(
                f"group is {self.group}; with {self.bits}-bit values choose one of {groups}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The format that `str` prints as `text`; LayoutError if there is none."""
        match = _FORMAT.fullmatch(text)
        if match is None:
            raise LayoutError(
                f"{text!r} is no format; write 5:16-int4-g128, 8:16-bf16, dense-int8-g64 or alike"
            )
        kept, bits, group = match.groups()
        found = cls(int(kept or SPAN), int(bits or 16), int(group or 0))
        if str(found) != text:
            raise LayoutError(f"{text!r} is no format; write {found}")
        return found

    def __str__(self) -> str:
        pattern = "dense" if self.dense else f"{self.kept}:16"
        return f"{pattern}-bf16" if self.bits == 16 else f"{pattern}-int{self.bits}-g{self.group}"

    @property
    def dense(self) -> bool:
        return self.kept == SPAN


SHIPPED = tuple(
    map(
        Format.parse,
        (
            *("4:16-int4-g64", "5:16-int4-g64", "6:16-int4-g64", "8:16-int4-g64"),
            *("4:16-int4-g128", "5:16-int4-g128", "6:16-int4-g128", "8:16-int4-g128"),
            *("5:16-int8-g64", "8:16-int8-g64", "5:16-bf16", "8:16-bf16"),
            *("dense-int4-g32", "dense-int4-g64", "dense-int4-g128"),
            *("dense-int8-g64", "dense-int8-g128"),
        ),
    )
)
"""Formats whose kernels come compiled; those of all others are compiled where they run."""

Shape = tuple[int, ...]


def padded(rows: int) -> int:
    """R', the rows that are stored."""
    return -(-rows // TILE) * TILE


def tensor_shapes(
    format: Format, rows: int, columns: int, experts: int | None = None
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shape and dtype of each tensor of a weight by field name; LayoutError if it cannot be."""
    if rows < 1 or columns < 1 or (experts is not None and experts < 1):
        raise LayoutError(f"a weight of {experts or 1} x {rows} x {columns} has nothing to store")
    step = max(SPAN, format.group)
    if columns % step:
        raise LayoutError(
            f"{columns} columns are no multiple of {step}, which {format} needs; "
            "choose a smaller group, or keep the weight as it is"
        )
    groups = columns // SPAN
    stack = (padded(rows) // TILE,) if experts is None else (experts, padded(rows) // TILE)
    shapes: dict[str, tuple[Shape, torch.dtype]] = {}
    if format.dense and format.bits == 4:
        shapes["codes"] = ((*stack, columns // 8, TILE), torch.int32)
    elif format.dense:
        shapes["codes"] = ((*stack, columns, TILE), torch.int8)
    else:
        dtype = {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[format.bits]
        shapes["codes"] = ((*stack, groups, format.kept, TILE), dtype)
        if format.bits > 4:
            shapes["positions"] = ((*stack, groups, (format.kept + 1) // 2, TILE), torch.uint8)
    if format.group:
        shapes["scales"] = ((*stack, columns // format.group, TILE), torch.bfloat16)
    return shapes


def tensor_types(format: Format) -> list[str]:
    """Triton's types of the tensors that a kernel of the format takes, in their order.

    Codes, positions (sparse formats; "none" of N:16 int4), scales ("none" of bf16).
    """
    triton = {torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.bfloat16: "*bf16"}
    shapes = tensor_shapes(format, SPAN, 128)
    names = ["codes", "scales"] if format.dense else ["codes", "positions", "scales"]
    return [triton[shapes[name][1]] if name in shapes else "none" for name in names]


def packed_bytes(format: Format, rows: int, columns: int, experts: int = 1) -> int:
    """Bytes of a weight in `format`, padding included."""
    shapes = tensor_shapes(format, rows, columns, experts).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight [R, K], or E stacked ones, in one of the formats of this module."""

    format: Format
    rows: int
    columns: int
    codes: Tensor
    positions: Tensor | None
    scales: Tensor | None

    @property
    def experts(self) -> int | None:
        """E, or None of a weight that is not stacked."""
        single = 3 if self.format.dense else 4
        return self.codes.shape[0] if self.codes.dim() > single else None

    @property
    def shape(self) -> tuple[int, ...]:
        """[E?, R, K] of the dense weight."""
        stack = () if self.experts is None else (self.experts,)
        return (*stack, self.rows, self.columns)

    @property
    def tiles(self) -> int:
        """T, of each expert."""
        return self.codes.shape[0 if self.experts is None else 1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight of the dense matrix, scales and padding included."""
        return 8 * self.nbytes / ((self.experts or 1) * self.rows * self.columns)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the format has, by field name."""
        fields = {"codes": self.codes, "positions": self.positions, "scales": self.scales}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same weight on `device`; itself if it is there."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return from_tensors(self.format, self.rows, self.columns, moved)

    def expert(self, index: int) -> "PackedWeight":
        """One weight of a stack, as a view."""
        own = {name: tensor[index] for name, tensor in self.tensors().items()}
        return from_tensors(self.format, self.rows, self.columns, own)


def from_tensors(
    format: Format, rows: int, columns: int, tensors: dict[str, Tensor]
) -> PackedWeight:
    """The inverse of `PackedWeight.tensors`; unchecked, see `validate`."""
    return PackedWeight(
        format, rows, columns, tensors["codes"], tensors.get("positions"), tensors.get("scales")
    )
