"""The most device memory that was taken, by torch and beside it.

Given up: other processes are counted as if they were ours.
"""

import torch

GIB = 1 << 30


def peak_gib() -> float:
    """What the device had taken at most."""
    if not torch.cuda.is_available():
        return 0.0
    free, whole = torch.cuda.mem_get_info()
    beside = whole - free - torch.cuda.memory_reserved()
    return (beside + torch.cuda.max_memory_reserved()) / GIB


def reset_peak() -> None:
    """Forget what was reserved before."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
