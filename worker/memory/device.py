"""What a device has in memory, and what of it is free."""

import os
from pathlib import Path

import torch

_GPU_SHARE = 0.9
"""Of the GPU memory free after loading; the rest is for activations."""
_CPU_SHARE, _CPU_LIMIT = 0.25, 2**30
"""Of the free host memory, and at most: other programs live there too."""

LIBRARY = 32 * 2**20
"""What torch allocates for cuBLAS for each stream that multiplies, on Hopper; elsewhere less."""


def memory_of(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device) -> int:
    """Bytes that are free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_memory() -> int:
    """Bytes of the host that a process may have, those among them that files are cached in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):  # only Linux tells
        return free_memory(torch.device("cpu"))
    return int(kib) * 1024


def cache_memory(device: torch.device) -> int:
    """Bytes that the KV cache may take by default."""
    free = free_memory(device)
    if device.type == "cuda":
        return int(free * _GPU_SHARE)
    return min(int(free * _CPU_SHARE), _CPU_LIMIT)


def library_memory(device: torch.device) -> int:
    """Bytes that products take for each stream on which they run, beside what they read and write.

    The allocator counts them, and they stay.
    """
    return LIBRARY if device.type == "cuda" else 0
