"""Kernels that begin while the one in front of them ends: NVIDIA's programmatic dependent launch.

Such a kernel may read what nobody writes, weights, before it waits (`gdc_wait`); then all kernels
before it have ended, and it may touch anything. It tells when the next one may begin
(`gdc_launch_dependents`). Early is not always better: what waits takes room and bandwidth from who
works, so the place is measured for each (docs/log.md, "When to let the next kernel begin").
"""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .targets import ALL, Target, target_of


@triton.jit
def wait_in_turn(OVERLAP: tl.constexpr):
    """Wait for all kernels before this one, and let the next begin only then."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlaps(target: Target) -> bool:
    """Whether a kernel can begin before the one in front of it has ended."""
    return target.vendor == "nvidia" and target.capability >= 90


def overlaps_on(tensor: Tensor) -> bool:
    """The same of where a tensor lies."""
    return tensor.is_cuda and overlaps(target_of(tensor.get_device()))


def overlap_options(overlap: bool) -> dict[str, int]:
    """Compile options of a kernel that does, or does not."""
    return {"launch_pdl": True} if overlap else {}


def both_ways(among: Sequence[Target] = ALL) -> Iterator[tuple[bool, tuple[Target, ...]]]:
    """Whether kernels overlap, and the targets that the bundle has such variants for."""
    for overlap in (True, False):
        yield overlap, tuple(target for target in among if overlaps(target) is overlap)
