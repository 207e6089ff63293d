"""Reads bundles of compiled kernels, and starts their kernels through the vendors' drivers.

A bundle is a zip archive: `manifest.json` (format, versions, and the sha256 of each target's list),
`<target>.json` (a list of `Entry`) and `binaries/<sha256>`. What is read is checked first.

A kernel's parameters are its tensors (addresses), i32 and fp32 values, in the order of its source,
then two addresses of scratch memory that Triton adds to every kernel; ours need none.
"""

import ctypes
import hashlib
import json
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from zipfile import ZipFile

import torch

from ..errors import BundleError, KernelMissing, LaunchError
from .targets import Target, binary_for, ptx_for

PACKAGED = Path(__file__).parent.parent / "bundle.zip"
"""Where the bundle of an installed package is."""
FORMAT = 1
_STATIC_SHARED_MEMORY = 48 * 1024
"""Bytes that CUDA gives a block without being asked."""
_PREFER_SHARED, _MAX_SHARED_BYTES, _RELAXED_CAPTURE = 1, 8, 2
_COOPERATIVE, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 6
_CONFIG = struct.Struct("7I4xQQI4x")
"""CUlaunchConfig: grid x y z, block x y z, shared memory; stream; attributes; their number."""
_GRID, _STREAM, _STREAM_OFFSET = struct.Struct("3I"), struct.Struct("Q"), 32
_ATTRIBUTE = struct.Struct("I4xi60x")
"""CUlaunchAttribute: its id and a union of 64 bytes."""


@dataclass(frozen=True, slots=True)
class Binary:
    """A kernel compiled for one processor, and what its launch has to know."""

    image: bytes
    """A cubin, PTX, or AMD's code object."""
    symbol: str
    threads: int
    """Threads in a block."""
    shared: int
    """Bytes of shared memory for a block."""
    programmatic: bool = False
    """NVIDIA: may start before the kernel ahead of it in the stream has ended, and waits itself."""
    cooperative: bool = False
    """All blocks are resident at once and may wait for one another."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a bundle says of one variant for one target."""

    variant: str
    """Its name, as `str(Variant)` makes it."""
    kernel: str
    source: str
    """sha256 of the kernel's source; a program of another source is another program."""
    arguments: list[tuple[str, str]]
    """Name and Triton's type of each."""
    scratch: int
    """How many addresses of scratch memory come after the arguments; a launch passes nulls."""
    constants: dict[str, str]
    grid: str
    """How many blocks to start, in the words of the kernel's author."""
    warps: int
    stages: int
    options: dict[str, str]
    symbol: str
    threads: int
    shared: int
    programmatic: bool
    cooperative: bool
    registers: int
    """Of a thread; on AMD vector registers."""
    spilled: int
    """Registers of a thread that did not fit and are kept in memory."""
    stack: int
    """Bytes of a thread's memory for them and for local arrays."""
    binary: str
    """sha256, which is its name in the archive too."""
    ptx: str | None
    """sha256 of the PTX for newer cards, where there is some."""


class Bundle:
    """An archive of compiled kernels, opened; raises `BundleError` naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lists: dict[str, dict[str, Entry]] = {}
        with self._reading():
            self._archive = ZipFile(path)
            self.manifest: dict[str, Any] = json.loads(self._archive.read("manifest.json"))
            if self.manifest["format"] != FORMAT:
                raise BundleError(
                    f"{path} has format {self.manifest['format']}; this Conclave reads {FORMAT}"
                )
            self.targets: dict[str, str] = dict(self.manifest["targets"])
            """The sha256 of each target's list."""

    def entries(self, target: str) -> dict[str, Entry]:
        """What there is for a target, by the variants' names; BundleError of an unknown one."""
        if target not in self.targets:
            raise BundleError(f"{self.path} has no {target}; it has {', '.join(self.targets)}")
        if target not in self._lists:
            content = self._read(f"{target}.json", self.targets[target])
            with self._reading():
                listed = [Entry(**each) for each in json.loads(content)]
            self._lists[target] = {each.variant: each for each in listed}
        return self._lists[target]

    def find(self, card: Target, variant: str, source: str) -> tuple[Binary, str]:
        """A variant for a card, made from the given source; and "bundle", or "ptx" for plan B.

        Raises `KernelMissing`.
        """
        target, kind = binary_for(card, self.targets), "bundle"
        if target is None:
            target, kind = ptx_for(card, self.targets), "ptx"
        if target is None:
            raise KernelMissing(f"{self.path} has nothing that {card.name} can run")
        entry = self.entries(target).get(variant)
        if entry is None:
            raise KernelMissing(f"{self.path} has no {variant} for {target}")
        if entry.source != source:
            raise KernelMissing(f"{self.path} has {variant} of another source")
        name = entry.binary if kind == "bundle" else entry.ptx
        if name is None:
            raise KernelMissing(f"{self.path} has no PTX of {variant}")
        image = self._read(f"binaries/{name}", name)
        return Binary(
            image, entry.symbol, entry.threads, entry.shared, entry.programmatic, entry.cooperative
        ), kind

    def check(self) -> None:
        """Reads all that the archive should have; raises `BundleError` at the first fault."""
        for target in self.targets:
            for entry in self.entries(target).values():
                for name in filter(None, (entry.binary, entry.ptx)):
                    self._read(f"binaries/{name}", name)

    def _read(self, member: str, sha256: str) -> bytes:
        with self._reading():
            content = self._archive.read(member)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise BundleError(f"{self.path}: {member} has been changed")
        return content

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except BundleError:
            raise
        except Exception as error:  # zipfile and zlib meet broken bytes with a dozen kinds
            raise BundleError(f"{self.path} is no whole bundle of kernels: {error!r}") from error


class Launch(Protocol):
    """A loaded kernel."""

    def __call__(self, x: int, y: int, z: int, stream: int, values: Sequence[float]) -> None:
        """Puts one launch of a grid [x, y, z] of blocks into the driver's stream."""


class Driver(Protocol):
    """A vendor's driver."""

    def load(self, device: int, binary: Binary, types: Sequence[str]) -> Launch:
        """Loads a kernel whose arguments have the given types ("*bf16", "i32", "fp32")."""

    def current_device(self) -> int:
        """The calling thread's."""

    def current_stream(self, device: int) -> int:
        """torch's current stream of a device, as the driver's handle."""


class Arguments:
    """Memory for one kernel's arguments, and the pointers to each that a driver wants."""

    def __init__(self, types: Sequence[str]) -> None:
        codes = ["Q" if each.startswith("*") else {"i32": "i", "fp32": "f"}[each] for each in types]
        self._layout = struct.Struct("@" + "".join(codes))
        ends = [struct.calcsize("@" + "".join(codes[: n + 1])) for n in range(len(codes))]
        offsets = [end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)]
        scratch = -(-self._layout.size // 8) * 8
        self._memory = ctypes.create_string_buffer(scratch + 16)
        start = ctypes.addressof(self._memory)
        addresses = [start + offset for offset in (*offsets, scratch, scratch + 8)]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self.address = ctypes.addressof(self._pointers)
        """Of the array of pointers."""

    def write(self, values: Sequence[float]) -> None:
        """Sets all arguments; raises struct.error for an integer that needs more than 32 bits."""
        self._layout.pack_into(self._memory, 0, *values)


class _TorchState:
    """What torch answers under the same names for both vendors."""

    def current_device(self) -> int:
        return torch._C._cuda_getDevice()

    def current_stream(self, device: int) -> int:
        return torch._C._cuda_getCurrentRawStream(device)


class Cuda(_TorchState):
    """NVIDIA's driver, in the primary contexts that torch uses too."""

    def __init__(self, library: Any) -> None:
        self.start = library.cuLaunchKernelEx
        self.start.argtypes = [ctypes.c_void_p] * 4
        self._library = library
        self._entered = threading.local()

    def load(self, device: int, binary: Binary, types: Sequence[str]) -> Launch:
        self.enter(device)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        with self._loading_allowed():
            self._call("cuModuleLoadData", ctypes.byref(module), binary.image)
            name = binary.symbol.encode()
            self._call("cuModuleGetFunction", ctypes.byref(function), module, name)
            if binary.shared > _STATIC_SHARED_MEMORY:
                self._call("cuFuncSetCacheConfig", function, _PREFER_SHARED)
                self._call("cuFuncSetAttribute", function, _MAX_SHARED_BYTES, binary.shared)
        return _CudaLaunch(self, device, function, binary, types)

    def enter(self, device: int) -> None:
        """Sees to it that the calling thread has a context: one that never used torch has none."""
        if hasattr(self._entered, "once"):
            return
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context:
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._call("cuCtxSetCurrent", context)
        self._entered.once = True

    @contextmanager
    def _loading_allowed(self) -> Iterator[None]:
        """Lets this thread load modules while a stream is being captured into a graph."""
        mode = ctypes.c_int(_RELAXED_CAPTURE)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self.fail(name, status)

    def fail(self, name: str, status: int) -> None:
        """Raises what the driver says of a call that did not return 0."""
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        raise LaunchError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


class _CudaLaunch:
    """One function of a loaded module, with its launch made ready in memory."""

    def __init__(
        self,
        driver: Cuda,
        device: int,
        function: ctypes.c_void_p,
        binary: Binary,
        types: Sequence[str],
    ) -> None:
        wanted = [_PROGRAMMATIC_STREAM_SERIALIZATION] * binary.programmatic
        wanted += [_COOPERATIVE] * binary.cooperative
        self._attributes = ctypes.create_string_buffer(
            b"".join(_ATTRIBUTE.pack(each, 1) for each in wanted)
        )
        attributes = ctypes.addressof(self._attributes) if wanted else 0
        block = (binary.threads, 1, 1, binary.shared)
        config = _CONFIG.pack(0, 0, 0, *block, 0, attributes, len(wanted))
        self._config = ctypes.create_string_buffer(config, _CONFIG.size)
        self._arguments = Arguments(types)
        self._call = (ctypes.addressof(self._config), function, self._arguments.address, None)
        self._driver, self._device = driver, device
        self._start, self._lock = driver.start, threading.Lock()

    def __call__(self, x: int, y: int, z: int, stream: int, values: Sequence[float]) -> None:
        self._driver.enter(self._device)
        with self._lock:  # the driver runs without Python's lock, and reads this memory
            self._arguments.write(values)
            _GRID.pack_into(self._config, 0, x, y, z)
            _STREAM.pack_into(self._config, _STREAM_OFFSET, stream)
            status = self._start(*self._call)
        if status:
            self._driver.fail("cuLaunchKernelEx", status)


class Hip(_TorchState):
    """AMD's driver."""

    def __init__(self, library: Any) -> None:
        numbers, pointer = [ctypes.c_uint] * 7, ctypes.c_void_p
        for start in (library.hipModuleLaunchKernel, library.hipModuleLaunchCooperativeKernel):
            start.argtypes = [pointer, *numbers, pointer, pointer, pointer]
        library.hipGetErrorString.restype = ctypes.c_char_p
        self._library = library

    def load(self, device: int, binary: Binary, types: Sequence[str]) -> Launch:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("hipModuleLoadData", ctypes.byref(module), binary.image)
        name = binary.symbol.encode()
        self._call("hipModuleGetFunction", ctypes.byref(function), module, name)
        arguments, lock = Arguments(types), threading.Lock()
        start = "hipModuleLaunch" + ("Cooperative" if binary.cooperative else "") + "Kernel"
        block = (binary.threads, 1, 1, binary.shared)

        def launch(x: int, y: int, z: int, stream: int, values: Sequence[float]) -> None:
            with lock:  # the driver runs without Python's lock, and reads this memory
                arguments.write(values)
                self._call(start, function, x, y, z, *block, stream, arguments.address, None)

        return launch

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = self._library.hipGetErrorString(status) or b"unknown error"
            raise LaunchError(f"{name}: {text.decode()} ({status})")


@cache
def driver() -> Driver:
    """The driver of this machine's cards, the library that torch uses; loaded once."""
    if torch.version.hip is None:
        return Cuda(ctypes.CDLL("libcuda.so.1"))
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    library = next((path for path in mapped if "libamdhip64.so" in path), "libamdhip64.so")
    return Hip(ctypes.CDLL(library))
