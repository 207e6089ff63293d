"""What can be compiled: kernels, and the variants of each that the bundle holds.

A variant fixes all of a kernel but the values of its arguments. Integers are plain i32 and pointers
are aligned to 16 bytes, in the bundle and when compiled where it runs: both make the same program.
"""

import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from ..errors import KernelInputError, LaunchError
from .loader import Binary
from .targets import ALL, Target

ALIGNMENT = 16
"""Bytes that every tensor's address must be a multiple of."""
_DIVISIBLE = [["tt.divisibility", 16]]
TYPES: dict[Any, str] = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
    None: "none",
}
"""Triton's names of what an argument can be; a None is a constant of the program."""


class Program:
    """A kernel's source: what `@triton.jit` or `@gluon.jit` made of a function."""

    def __init__(
        self,
        function: Any,
        *,
        name: str | None = None,
        grid: str = "",
        multiples_of_16: Sequence[str] = (),
    ) -> None:
        """`multiples_of_16` names the integers that the program may rely on to be such.

        `name` is the function's by default, and must be unlike those of all other kernels. `grid`
        tells readers of a bundle how many blocks to start: "cdiv(rows, BLOCK), splits".
        """
        self.function = function
        self.name: str = name or function.__name__.lstrip("_")
        self.grid = grid
        self.parameters: list[str] = list(function.arg_names)
        annotations = function.fn.__annotations__
        self.constants = [n for n in self.parameters if "constexpr" in str(annotations.get(n))]
        self.arguments = [n for n in self.parameters if n not in self.constants]
        """The parameters that a launch passes, in order."""
        assert set(multiples_of_16) <= set(self.arguments), self.name
        self.multiples_of_16 = frozenset(multiples_of_16)

    @cached_property
    def source_hash(self) -> str:
        """sha256 of the function's text and that of our functions and constants that it uses."""
        digest = hashlib.sha256(json.dumps(sorted(self.multiples_of_16)).encode())
        for text in _texts(self.function, set()):
            digest.update(text.encode())
        return digest.hexdigest()


def _texts(function: Any, seen: set[int]) -> Iterator[str]:
    """The text of a jitted function and, by name, of what it uses that is not Triton's."""
    if id(function) in seen or function.fn.__module__.startswith("triton."):
        return
    seen.add(id(function))
    yield function.src
    names = {*function.fn.__code__.co_names, *function.fn.__code__.co_freevars}
    scope = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
    used = {name: scope[name] for name in names & scope.keys()}
    for module in [each for each in used.values() if isinstance(each, ModuleType)]:
        used |= {name: vars(module)[name] for name in names & vars(module).keys()}
    for name, value in sorted(used.items()):
        if isinstance(value, JITFunction):
            yield from _texts(value, seen)
        elif isinstance(value, tl.constexpr):
            yield f"{name}={value.value}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One program to compile: a kernel with everything but the values of its arguments."""

    kernel: Program
    types: tuple[str, ...]
    """Triton's types of the arguments: "*bf16", "*u8", "i32", "fp32"; "none" for a None."""
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    targets: tuple[Target, ...] = ALL
    """What it is compiled for."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More of Triton's compile options; a vendor ignores those of others."""

    def __post_init__(self) -> None:
        kernel = self.kernel
        if len(self.types) != len(kernel.arguments) or not set(self.types) <= {*TYPES.values()}:
            raise KernelInputError(f"{kernel.name} takes {kernel.arguments}, not {self.types}")
        if set(self.constants) != set(kernel.constants):
            raise KernelInputError(
                f"{kernel.name} has the constants {kernel.constants}, not {list(self.constants)}"
            )

    @property
    def passed(self) -> list[str]:
        """Types of the arguments that the compiled kernel has; a None is not among them."""
        return [each for each in self.types if each != "none"]

    def __str__(self) -> str:
        """Names the variant in a bundle; equal for equal programs of one source."""
        constants = ", ".join(f"{n}={_text(self.constants[n])}" for n in self.kernel.constants)
        options = "".join(f", {n}={_text(v)}" for n, v in sorted(self.options.items()))
        types = ", ".join(self.types)
        end = f"warps={self.warps}, stages={self.stages}{options}"
        return f"{self.kernel.name}({types})[{constants}]({end})"


def _text(value: Any) -> str:
    """A constant, the same in every process."""
    if value is None or isinstance(value, int | float | str):
        return json.dumps(int(value) if isinstance(value, bool) else value)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, tl.dtype) or is_dataclass(value):
        return str(value)
    raise KernelInputError(f"a kernel's constant cannot be a {type(value).__name__}")


def compile_variant(variant: Variant, target: Target) -> tuple[Binary, str]:
    """What Triton makes of a variant: the binary, and its assembly (NVIDIA's is PTX).

    Raises `LaunchError` for a program that the target cannot run, or that we cannot launch.
    """
    kernel = variant.kernel
    places = {name: (place,) for place, name in enumerate(kernel.parameters)}
    signature = dict.fromkeys(kernel.parameters, "constexpr")
    constants = {places[name]: value for name, value in variant.constants.items()}
    attributes = {}
    for name, kind in zip(kernel.arguments, variant.types, strict=True):
        if kind == "none":
            constants[places[name]] = None
            continue
        signature[name] = kind
        if kind.startswith("*") or name in kernel.multiples_of_16:
            attributes[places[name]] = _DIVISIBLE
    source = GluonASTSource if kernel.function.is_gluon() else ASTSource
    compiled = triton.compile(
        source(kernel.function, signature, constants, attributes),
        target=GPUTarget(target.backend, target.architecture, target.warp_size),
        options={"num_warps": variant.warps, "num_stages": variant.stages, **variant.options},
    )
    made = compiled.metadata
    if made.num_ctas != 1 or getattr(made, "global_scratch_size", 0) or made.profile_scratch_size:
        raise LaunchError(f"{variant} needs a cluster of blocks or scratch memory; we give neither")
    if made.shared > target.shared_memory:
        raise LaunchError(
            f"{variant} needs {made.shared} bytes of shared memory; {target.name} has "
            f"{target.shared_memory}"
        )
    binary = Binary(
        image=compiled.kernel,
        symbol=made.name,
        threads=made.num_warps * target.warp_size,
        shared=made.shared,
        programmatic=getattr(made, "launch_pdl", False),
        cooperative=made.launch_cooperative_grid,
    )
    return binary, compiled.asm["ptx" if target.vendor == "nvidia" else "amdgcn"]


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes of a processor."""

    parameters: int
    """With the addresses of scratch memory that Triton adds."""
    registers: int
    """Of a thread; on AMD vector registers."""
    spilled: int
    """Registers of a thread that did not fit and are kept in memory."""
    stack: int
    """Bytes of a thread's memory for them and for local arrays."""


def resources(binary: Binary, assembly: str, target: Target) -> Resources:
    """Read from NVIDIA's cubin, or from the metadata that AMD's assembly ends with."""
    if target.vendor == "amd":
        numbers = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.M)}
        return Resources(
            # The driver itself fills in the hidden ones, such as the grid's size.
            parameters=len(re.findall(r"\.value_kind:\s+(?!hidden_|\s)", assembly)),
            registers=numbers["vgpr_count"],
            spilled=numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
            stack=numbers["private_segment_fixed_size"],
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.image)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found is not None, said
    registers, stack, local = map(int, found.groups())
    memory = max(stack, local)
    parameters = len(re.findall(r"^\s*\.param ", assembly, re.M))
    return Resources(parameters, registers, memory // 4, memory)
