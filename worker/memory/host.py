"""Host memory that a GPU copies from at the link's full rate: exact sizes, locked when filled.

torch's own pinned memory comes in powers of two, 1.6 times what is asked for (sglang#36562), and
copying from memory that is not locked goes through a bounce buffer, synchronously, at half the
rate. Locking pages that have never been written takes much longer than locking filled ones, so
filling comes first; what then turns out to be without use is not locked. What it gave up: a choice
of NUMA node; pages lie where they were filled.
"""

import mmap
import resource
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from ..errors import ConfigError
from .plan import gib

STREAMED = "a layer that is streamed"
FEWER = "or raise knobs.memory_budget so that fewer layers are streamed"


class HostBlock:
    """Bytes in pages of their own.

    Args:
        size: in bytes.
        use: what they are for, in the words of errors.
        remedy: what else the user may do if the host refuses.

    Raises:
        ConfigError: the host has no such memory.
    """

    def __init__(self, size: int, use: str = STREAMED, remedy: str = FEWER) -> None:
        self._use, self._remedy = use, remedy
        try:
            # Private, so that it counts as the process's own and not as shared memory.
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the host has no {gib(size)} for {use} ({error}); free some, {remedy}"
            ) from error
        with suppress(OSError):  # without huge pages it is filled and locked more slowly
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.memory: Tensor = torch.frombuffer(pages, dtype=torch.uint8)
        """uint8 [size]; keeps the pages."""
        self._locked = False

    def trim(self, size: int) -> None:
        """Keep so many of the first bytes alone; called before they are locked."""
        self.memory = self.memory[:size]

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.memory)

    def lock(self) -> None:
        """Keep the pages where they are, so that a GPU can copy from them by itself.

        Raises ConfigError if the host refuses.
        """
        status = torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.size, 0)
        if int(status) != 0:
            reason = torch.cuda.cudart().cudaGetErrorString(status)
            raise ConfigError(refusal(self.size, reason, self._use, self._remedy))
        self._locked = True

    def close(self) -> None:
        """Let the pages go; nobody may be copying from them."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
            self._locked = False
        self.memory = torch.empty(0, dtype=torch.uint8)


def release(blocks: Iterable[HostBlock], device: torch.device) -> None:
    """Close blocks, once nothing on the device copies from them any more."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # a device that broke copies nothing
            torch.cuda.synchronize(device)
    for block in blocks:
        block.close()


def refusal(size: int, reason: str, use: str = STREAMED, remedy: str = FEWER) -> str:
    """What to do where the host locks no memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = "unlimited" if limit == resource.RLIM_INFINITY else gib(limit)
    return (
        f"the host does not lock {gib(size)} more for {use} ({reason}); the process may lock "
        f"{allowed} (`ulimit -l`): raise that, or the container's memory limit, {remedy}"
    )
