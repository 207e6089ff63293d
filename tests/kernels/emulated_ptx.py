"""The PTX inside our Triton kernels, one instruction after the other, on numpy arrays.

Triton's interpreter has no inline assembly. Here the last axis of a block is the 32 lanes of a
warp, and a register is an array of bits. What is emulated is what the kernels use and no more.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint32]
Registers = dict[str, Bits]


class Emulated:
    """Results of one piece of assembly, as Triton asks for them."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        return self._handles[index]


def run(text: str, constraints: str, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The outputs that `text` makes of `inputs`, float32 or int32 as the `constraints` say."""
    kinds = [each.strip("=&") for each in constraints.split(",") if each.startswith("=")]
    registers: Registers = {}
    for number, given in enumerate(inputs, len(kinds)):
        registers[f"${number}"] = np.ascontiguousarray(given).view(np.uint32)
    for line in filter(None, (part.strip() for part in text.strip("{} \n").split(";"))):
        if not line.startswith(".reg"):
            _step(line, registers)
    types = {"f": np.float32, "r": np.int32}
    return [registers[f"${n}"].view(types[kind]) for n, kind in enumerate(kinds)]


def _step(line: str, registers: Registers) -> None:
    name, _, rest = line.partition(" ")
    operands = [part.strip() for part in re.split(r",(?![^{]*\})", rest)]
    if name == "mov.b32" and operands[0].startswith("{"):
        low, high = _names(operands[0])
        whole = _read(operands[1], registers)
        registers[low], registers[high] = whole & np.uint32(0xFFFF), whole >> np.uint32(16)
    elif name == "mov.b32" and operands[1].startswith("{"):
        low, high = (_read(each, registers) for each in _names(operands[1]))
        registers[operands[0]] = low | high << 16
    else:
        values = [_read(each, registers) for each in operands[1:]]
        registers[operands[0]] = _INSTRUCTIONS[name](*values)


def _names(pair: str) -> list[str]:
    return [each.strip() for each in pair.strip("{}").split(",")]


def _read(operand: str, registers: Registers) -> Any:
    if operand.startswith("0f"):
        return np.uint32(int(operand[2:], 16))
    if operand.lstrip("-")[:1].isdigit():
        return np.uint32(int(operand, 0) & 0xFFFFFFFF)
    return registers[operand]


def _float(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, np.uint32).view(np.float32).astype(np.float64)


def _single(values: NDArray[np.float64]) -> Bits:
    return values.astype(np.float32).view(np.uint32)


def _halves(values: Any) -> NDArray[np.float64]:
    bits = np.asarray(values, np.uint32)
    both = np.stack((bits & 0xFFFF, bits >> 16), -1).astype(np.uint16)
    return both.view(np.float16).astype(np.float64)


def _pair(values: NDArray[np.float64]) -> Bits:
    bits: Bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return bits[..., 0] | bits[..., 1] << np.uint32(16)


def _shuffle(values: Bits, index: Bits, clamp: Any, members: Any) -> Bits:
    assert values.shape[-1] == 32 and clamp == 31 and members == 0xFFFFFFFF
    return np.take_along_axis(values, (index & 31).astype(np.int64), -1)


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Bits:
    """Bit i of the table is for a, b, c being the bits of i, `a` the highest."""
    result: Bits = np.zeros_like(np.asarray(a) | b | c)
    for row in range(8):
        if int(table) >> row & 1:
            picked = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            result |= picked
    return result


_INSTRUCTIONS: dict[str, Callable[..., Bits]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "shfl.sync.idx.b32": _shuffle,
    "lop3.b32": _lop3,
    "sub.f32": lambda a, b: _single(_float(a) - _float(b)),
    "fma.rn.f32": lambda a, b, c: _single(_float(a) * _float(b) + _float(c)),
    "add.rn.f16x2": lambda a, b: _pair(_halves(a) + _halves(b)),
    "fma.rn.f16x2": lambda a, b, c: _pair(_halves(a) * _halves(b) + _halves(c)),
    "cvt.f32.f16": lambda a: _single(_halves(a)[..., 0]),
}
