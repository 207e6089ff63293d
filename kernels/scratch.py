"""Scratch memory for weights that are written out dense: one piece a device, which all share.

Ops that use it must run one after the other, as they do in one stream.
"""

import threading

import torch
from torch import Tensor

from .errors import KernelInputError
from .formats import PackedWeight

MOST_EXPANDED = 1 << 28
"""Weights that are written out dense at once: all of any layer, but not of a head."""

_memory: dict[torch.device, Tensor] = {}
_recorded: dict[int, Tensor] = {}
"""What CUDA graphs write to, by its address. Nothing tells when a graph is gone."""
_lock = threading.Lock()


def scratch(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """[R, K] of `dtype` on the device of a single weight, in memory as large as any has asked for.

    What a CUDA graph records stays for good, also when a larger weight gets memory of its own.
    Raises KernelInputError where a graph records and there is too little.
    """
    size = weight.rows * weight.columns * dtype.itemsize
    recording = torch.cuda.is_current_stream_capturing()
    with _lock:
        memory = _memory.get(weight.device)
        if memory is None or len(memory) < size:
            if recording:
                raise KernelInputError("call the layer once before a CUDA graph records it")
            memory = torch.empty(size, dtype=torch.uint8, device=weight.device)
            _memory[weight.device] = memory
        if recording:
            _recorded[memory.data_ptr()] = memory
    return memory[:size].view(dtype).view(weight.rows, weight.columns)
