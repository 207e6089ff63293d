"""The processors that kernels are compiled for, and which of their binaries a card can run.

A cubin runs on cards of the same major version and of the same or a newer minor one, except those
of sm_90 and newer: Triton compiles them with the features of just that processor (sm_90a), which
no other has. PTX of sm_89 or older is compiled by the driver of any newer card. AMD's code objects
run on the one processor that they name.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

KIB = 1024


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """One kind of processor."""

    name: str
    """`sm_90` or `gfx942`."""
    shared_memory: int
    """Bytes that a block may have at most."""

    @property
    def vendor(self) -> Literal["nvidia", "amd"]:
        return "nvidia" if self.name.startswith("sm_") else "amd"

    @property
    def backend(self) -> Literal["cuda", "hip"]:
        """Triton's name of the vendor."""
        return "cuda" if self.vendor == "nvidia" else "hip"

    @property
    def architecture(self) -> int | str:
        """As Triton's `GPUTarget` has it: 90, or "gfx942"."""
        return self.capability if self.vendor == "nvidia" else self.name

    @property
    def warp_size(self) -> int:
        """Threads in a warp: 64 on gfx9, elsewhere 32."""
        return 64 if self.name.startswith("gfx9") else 32

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability, ten times the major version plus the minor one."""
        assert self.vendor == "nvidia"
        return int(self.name.removeprefix("sm_"))

    @property
    def is_hopper(self) -> bool:
        """Whether it has `wgmma`."""
        return self.vendor == "nvidia" and self.capability == 90

    @property
    def has_portable_ptx(self) -> bool:
        """Whether newer cards can run the PTX of this one."""
        return self.vendor == "nvidia" and self.capability < 90


NVIDIA = (
    Target("sm_80", 163 * KIB),
    Target("sm_86", 99 * KIB),
    Target("sm_89", 99 * KIB),
    Target("sm_90", 227 * KIB),
    Target("sm_100", 227 * KIB),
    Target("sm_120", 99 * KIB),
)
HOPPER = tuple(target for target in NVIDIA if target.is_hopper)
AMD = tuple(
    Target(name, 64 * KIB)
    for name in ("gfx90a", "gfx942", "gfx1100", "gfx1101", "gfx1200", "gfx1201")
)
ALL = NVIDIA + AMD


def target_of(device: int) -> Target:
    """The processor of CUDA or HIP device `device`, whether or not bundles know it."""
    properties = torch.cuda.get_device_properties(device)
    least = properties.shared_memory_per_block
    shared_memory = getattr(properties, "shared_memory_per_block_optin", least)
    if torch.version.hip is not None:
        return Target(properties.gcnArchName.split(":")[0], shared_memory)
    return Target(f"sm_{properties.major}{properties.minor}", shared_memory)


@lru_cache
def processors_of(device: torch.device) -> int:
    """How many programs run at once, each by itself; a few on a CPU, in the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def binary_for(card: Target, compiled: Iterable[str]) -> str | None:
    """Which of the `compiled` targets' binaries the card runs best, by name; None: none of them."""
    names = set(compiled)
    if card.name in names:
        return card.name
    if card.vendor == "amd":
        return None
    fit = [
        target
        for target in NVIDIA
        if target.name in names
        and target.has_portable_ptx
        and target.capability // 10 == card.capability // 10
        and target.capability <= card.capability
    ]
    return max(fit, key=lambda target: target.capability).name if fit else None


def ptx_for(card: Target, compiled: Iterable[str]) -> str | None:
    """Which of the `compiled` targets' PTX the driver of an NVIDIA card can compile, by name."""
    if card.vendor == "amd":
        return None
    names = set(compiled)
    fit = [
        target
        for target in NVIDIA
        if target.name in names and target.has_portable_ptx and target.capability <= card.capability
    ]
    return max(fit, key=lambda target: target.capability).name if fit else None
