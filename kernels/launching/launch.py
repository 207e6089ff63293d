"""The one way kernels are started: a binary of the bundle if it has one, else compiled here.

    scale = Kernel(_scale, grid="cdiv(columns, BLOCK)", multiples_of_16=("columns",))
    scale.launch((rows,), out, x, columns, 0.5, constants={"BLOCK": 1024}, warps=4)

Where a variant comes from is looked up once for each device and kept:
    "bundle"       a binary of the bundle, which `CONCLAVE_KERNELS` or `use_bundle` may name
    "ptx"          the bundle's PTX, compiled by the driver of a card newer than the bundle
    "jit"          compiled by Triton now; `CONCLAVE_JIT=never` or `allow_jit(False)` forbids it
    "interpreter"  Triton's interpreter, on the CPU too: `TRITON_INTERPRET=1`
"""

import os
import struct
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..errors import KernelInputError, KernelMissing
from . import loader
from .loader import Binary, Bundle
from .targets import target_of
from .variant import ALIGNMENT, TYPES, Program, Variant, compile_variant

__all__ = ["Kernel", "Variant", "allow_jit", "jit_count", "launches", "use_bundle"]

MOST_BLOCKS = 65_535
"""Of a grid along y and z, on any card; along x there may be 2^31 - 1."""
_NOTHING: Mapping[str, Any] = {}


class Kernel(Program):
    """A kernel of ours, ready to be launched."""

    def __init__(self, function: Any, **about: Any) -> None:
        """As `Program`."""
        super().__init__(function, **about)
        self._multiples = [self.arguments.index(each) for each in self.multiples_of_16]
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

        `grid` has one to three sizes, the second and third at most `MOST_BLOCKS`; nothing is
        launched if one is 0. `arguments` are all parameters but the constants, in order, the first
        a tensor. `options` are more of Triton's compile options. Raises `KernelInputError`,
        `KernelMissing` and `LaunchError`.
        """
        x, y, z = (*grid, 1, 1)[:3]
        if y > MOST_BLOCKS or z > MOST_BLOCKS:
            raise KernelInputError(
                f"{self.name}: a grid of {x} x {y} x {z} blocks; a card takes {MOST_BLOCKS} along "
                "y and z: give it less at once"
            )
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
            types = tuple(TYPES.get(kind, str(kind)) for kind in kinds)
            variant = Variant(self, types, constants, warps, stages, options=options)
            loaded = _load_once(key, variant, device)
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
        if len(arguments) != len(self.arguments):
            self._refuse(arguments)
        given = dict(zip(self.arguments, arguments, strict=True))
        if any(given[name] % 16 for name in self.multiples_of_16):
            self._refuse(arguments)
        _interpreted[self.name] += 1
        if all(grid):
            self.function[tuple(grid)](**given, **constants)


class _Loaded:
    """A variant on one device."""

    def __init__(self, variant: Variant, device: int, binary: Binary, source: str) -> None:
        self.kernel, self.source, self.launches = variant.kernel.name, source, 0
        self._device, self._driver = device, loader.driver()
        self._start = self._driver.load(device, binary, variant.passed)

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
_retired: list[_Loaded] = []
"""Loaded from a bundle that is no longer in use."""
_loading = threading.Lock()
_interpreted: Counter[str] = Counter()
_jit_allowed = os.environ.get("CONCLAVE_JIT", "") != "never"
_bundle: Bundle | None = None
_bundle_chosen = False


def _load_once(key: tuple[Any, ...], variant: Variant, device: int) -> _Loaded:
    if device < 0:
        raise KernelInputError(f"{variant.kernel.name}: its tensors are not on a card")
    with _loading:
        if key not in _loaded:
            _loaded[key] = _load(variant, device)
        return _loaded[key]


def _load(variant: Variant, device: int) -> _Loaded:
    if not _bundle_chosen:
        _choose_bundle(_default_bundle())
    card = target_of(device)
    try:
        if _bundle is None:
            raise KernelMissing(f"there is no bundle to take {variant} from")
        return _Loaded(
            variant, device, *_bundle.find(card, str(variant), variant.kernel.source_hash)
        )
    except KernelMissing as missing:
        if not _jit_allowed:
            raise KernelMissing(f"{missing}; `make kernels` builds it") from None
    return _Loaded(variant, device, compile_variant(variant, card)[0], "jit")


def _default_bundle() -> Path | None:
    if "CONCLAVE_KERNELS" in os.environ:
        named = os.environ["CONCLAVE_KERNELS"]
        return Path(named) if named else None
    return loader.PACKAGED if loader.PACKAGED.exists() else None


def _choose_bundle(path: Path | None) -> None:
    global _bundle, _bundle_chosen
    _bundle = None if path is None else Bundle(path)
    _bundle_chosen = True


def use_bundle(path: Path | None) -> None:
    """Takes kernels from this archive from now on, or from none; what is loaded is let go.

    Before the first call it is the one that the environment's CONCLAVE_KERNELS names (none if that
    is empty), else the one in this package. Raises `BundleError`.
    """
    with _loading:
        _choose_bundle(path)
        _retired.extend(_loaded.values())
        _loaded.clear()


def allow_jit(allowed: bool) -> None:
    """Whether variants that the bundle lacks may be compiled in this process."""
    global _jit_allowed
    _jit_allowed = allowed


def jit_count() -> int:
    """How many variants this process has compiled, once for each device."""
    return sum(each.source == "jit" for each in (*_retired, *_loaded.values()))


def launches() -> Counter[tuple[str, str]]:
    """How often each (kernel, source) was launched in this process; a graph's replays count not."""
    counts = Counter({(name, "interpreter"): n for name, n in _interpreted.items()})
    for each in (*_retired, *_loaded.values()):
        counts[each.kernel, each.source] += each.launches
    return counts
