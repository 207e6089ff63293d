"""Kernels that begin while the one in front of them ends: NVIDIA's programmatic dependent launch.

Such a kernel lets the next one begin (`gdc_launch_dependents`), reads what nobody writes, weights,
and waits (`gdc_wait`) before it touches anything else: then all kernels before it have ended.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .targets import ALL, Target, target_of


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
