"""The one way kernels are started: a binary of the bundle if it has one, else compiled here.

    scale = Kernel(_scale, multiples_of_16=("columns",))
    scale.launch((rows,), out, x, columns, 0.5, constants={"BLOCK": 1024}, warps=4)

A variant of a kernel is named by the types of its arguments, its constants, warps and stages.
Integers are plain i32 and pointers are aligned to 16 bytes, in the bundle and when compiled here:
both run the same program. Under `TRITON_INTERPRET=1` kernels run in Python, on the CPU.

Where a variant comes from is looked up once for each device and kept:
    "jit"          compiled by Triton now; `CONCLAVE_JIT=never` or `allow_jit(False)` forbids it
    "interpreter"  Triton's interpreter
"""

import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from . import loader
from .errors import KernelInputError, KernelMissing, LaunchError
from .loader import Binary
from .targets import ALL, Target, target_of

ALIGNMENT = 16
"""Bytes that every tensor's address must be a multiple of."""
_NOTHING: Mapping[str, Any] = {}
_DIVISIBLE = [["tt.divisibility", 16]]
_TYPES: dict[Any, str] = {
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


class Kernel:
    """A kernel of ours; `function` is what `@triton.jit` or `@gluon.jit` made of it."""

    def __init__(
        self, function: Any, *, name: str | None = None, multiples_of_16: Sequence[str] = ()
    ) -> None:
        """`multiples_of_16` names the integers that the program may rely on to be such.

        `name` is the function's by default, and must be unlike those of all other kernels.
        """
        self.function = function
        self.name: str = name or function.__name__.lstrip("_")
        self.parameters: list[str] = list(function.arg_names)
        annotations = function.fn.__annotations__
        self.constants = [n for n in self.parameters if "constexpr" in str(annotations.get(n))]
        self.arguments = [n for n in self.parameters if n not in self.constants]
        """The parameters that a launch passes, in order."""
        assert set(multiples_of_16) <= set(self.arguments), self.name
        self.multiples_of_16 = frozenset(multiples_of_16)
        self._multiples = [self.arguments.index(each) for each in multiples_of_16]
        self._interpreted = not isinstance(function, JITFunction)

    def launch(
        self,
        grid: Sequence[int],
        *arguments: Tensor | int | float | None,
        constants: Mapping[str, Any] = _NOTHING,
        warps: int = 4,
        stages: int = 3,
        options: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """Puts the kernel into the current stream of the tensors' device.

        `grid` has one to three sizes; nothing is launched if one is 0. `arguments` are all
        parameters but the constants, in order, the first a tensor. `options` are more of Triton's
        compile options. Raises `KernelInputError`, `KernelMissing` and `LaunchError`.
        """
        if self._interpreted:
            return self._interpret(grid, arguments, constants)
        try:
            device = arguments[0].get_device()  # type: ignore[union-attr]
            values: list[Any] = []
            kinds: list[Any] = []
            for argument in arguments:
                kind: Any = type(argument)
                if kind is int or kind is float:
                    values.append(argument)
                elif argument is None:
                    kind = None
                else:
                    kind = argument.dtype  # type: ignore[union-attr]
                    address = argument.data_ptr()  # type: ignore[union-attr]
                    if address % ALIGNMENT or argument.get_device() != device:  # type: ignore[union-attr]
                        self._refuse(arguments)
                    values.append(address)
                kinds.append(kind)
            for place in self._multiples:
                if arguments[place] % 16:  # type: ignore[operator]
                    self._refuse(arguments)
        except (AttributeError, IndexError, TypeError):
            self._refuse(arguments)
        key = (self, device, *kinds, warps, stages, *constants.items(), *options.items())
        loaded = _loaded.get(key)
        if loaded is None:
            kept = [_TYPES.get(kind, str(kind)) for kind in kinds]
            variant = Variant(self, tuple(kept), constants, warps, stages, options=options)
            loaded = _load_once(key, variant, device)
        x, y, z = (*grid, 1, 1)[:3]
        if x * y * z:
            loaded.launch(x, y, z, values)

    def _refuse(self, arguments: Sequence[Any]) -> None:
        """Says what is wrong with arguments; raises `KernelInputError` at any rate."""
        for name, value in zip(self.arguments, arguments, strict=False):
            fault = ""
            if isinstance(value, Tensor):
                if value.get_device() != arguments[0].get_device():
                    fault = f"is on {value.device}, unlike the first tensor"
                elif value.data_ptr() % ALIGNMENT:
                    fault = f"is not aligned to {ALIGNMENT} bytes"
            elif not (value is None or type(value) in (int, float)):
                fault = f"is a {type(value).__name__}, not a tensor, int or float"
            elif name in self.multiples_of_16 and (type(value) is not int or value % 16):
                fault = f"is {value}, not a multiple of 16"
            if fault:
                raise KernelInputError(f"{self.name}: {name} {fault}")
        raise KernelInputError(f"{self.name} takes {self.arguments}, a tensor first")

    def _interpret(
        self, grid: Sequence[int], arguments: Sequence[Any], constants: Mapping[str, Any]
    ) -> None:
        given = dict(zip(self.arguments, arguments, strict=True))
        if any(given[name] % 16 for name in self.multiples_of_16):
            self._refuse(arguments)
        _interpreted[self.name] += 1
        if all(grid):
            self.function[tuple(grid)](**given, **constants)


@dataclass(frozen=True, slots=True)
class Variant:
    """One program to compile: a kernel with everything but the values of its arguments."""

    kernel: Kernel
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
        if len(self.types) != len(kernel.arguments) or not set(self.types) <= {*_TYPES.values()}:
            raise KernelInputError(f"{kernel.name} takes {kernel.arguments}, not {self.types}")
        if set(self.constants) != set(kernel.constants):
            raise KernelInputError(
                f"{kernel.name} has the constants {kernel.constants}, not {list(self.constants)}"
            )

    @property
    def key(self) -> str:
        """Names the variant in a bundle; equal for equal programs."""
        constants = ", ".join(f"{n}={_text(self.constants[n])}" for n in self.kernel.constants)
        options = "".join(f", {n}={_text(v)}" for n, v in sorted(self.options.items()))
        types = ", ".join(self.types)
        end = f"warps={self.warps}, stages={self.stages}{options}"
        return f"{self.kernel.name}({types})[{constants}]({end})"

    def __str__(self) -> str:
        return self.key


def _text(value: Any) -> str:
    """A constant, the same in every process."""
    if value is None or isinstance(value, int | float | str):
        return json.dumps(int(value) if isinstance(value, bool) else value)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, tl.dtype) or is_dataclass(value):
        return str(value)
    raise KernelInputError(f"a kernel's constant cannot be a {type(value).__name__}")


def compile_variant(variant: Variant, target: Target) -> tuple[Binary, str | None]:
    """What Triton makes of a variant: the binary, and NVIDIA's PTX of it.

    Raises `LaunchError` for a program that the target cannot run.
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
    return binary, compiled.asm.get("ptx")


class _Loaded:
    """A variant on one device."""

    def __init__(self, variant: Variant, device: int, binary: Binary, source: str) -> None:
        self.kernel, self.source, self.launches = variant.kernel.name, source, 0
        self._device, self._driver = device, loader.driver()
        types = [each for each in variant.types if each != "none"]
        self._start = self._driver.load(device, binary, types)

    def launch(self, x: int, y: int, z: int, values: Sequence[float]) -> None:
        """Puts it into the current stream; `values` are the arguments without Nones."""
        driver, device = self._driver, self._device
        if driver.current_device() != device:
            with torch.cuda.device(device):
                return self.launch(x, y, z, values)
        try:
            self._start(x, y, z, driver.current_stream(device), values)
        except struct.error as error:
            raise KernelInputError(f"{self.kernel}: {values} do not fit 32 bits") from error
        self.launches += 1


_loaded: dict[tuple[Any, ...], _Loaded] = {}
_loading = threading.Lock()
_interpreted: Counter[str] = Counter()
_jit_allowed = os.environ.get("CONCLAVE_JIT", "") != "never"


def _load_once(key: tuple[Any, ...], variant: Variant, device: int) -> _Loaded:
    with _loading:
        if key not in _loaded:
            _loaded[key] = _load(variant, device)
        return _loaded[key]


def _load(variant: Variant, device: int) -> _Loaded:
    if device < 0:
        raise KernelInputError(f"{variant.kernel.name}: its tensors are on the CPU")
    target = target_of(device)
    if not _jit_allowed:
        raise KernelMissing(f"{variant} is not in the bundle; `make kernels` builds it")
    return _Loaded(variant, device, compile_variant(variant, target)[0], "jit")


def allow_jit(allowed: bool) -> None:
    """Whether variants that the bundle lacks may be compiled in this process."""
    global _jit_allowed
    _jit_allowed = allowed


def jit_count() -> int:
    """How many variants this process has compiled, once for each device."""
    return sum(each.source == "jit" for each in _loaded.values())


def launches() -> Counter[tuple[str, str]]:
    """How often each (kernel, source) was launched in this process; a graph's replays count not."""
    counts = Counter({(name, "interpreter"): n for name, n in _interpreted.items()})
    for each in _loaded.values():
        counts[each.kernel, each.source] += each.launches
    return counts
