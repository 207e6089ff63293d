"""The rates of this machine's GPU: half a second of copies and products."""

from collections.abc import Callable

import torch

from .forecast import OF_COPY, Rates
from .host import HostBlock

_BYTES = 1 << 28
_SIZE = 8192
_REPEATS = 4


def measured_rates(device: torch.device) -> Rates:
    """Of a CUDA device.

    Weights are read at the rate of a copy on the device, times what kernels reach of it on an H100.
    Raises ConfigError if the host locks no memory.
    """
    link = link_rate(device)
    source, target = (torch.empty(_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    memory = 2 * _BYTES / _seconds(lambda: target.copy_(source))
    left = torch.zeros(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
    compute = 2 * _SIZE**3 / _seconds(lambda: torch.mm(left, left))
    return Rates(link, memory * OF_COPY, compute)


def link_rate(device: torch.device) -> float:
    """Bytes a second from locked host memory."""
    block = HostBlock(_BYTES)
    block.memory.zero_()
    block.lock()
    target = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    rate = _BYTES / _seconds(lambda: target.copy_(block.memory, non_blocking=True))
    block.close()
    return rate


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, after the first."""
    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPEATS):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / _REPEATS
