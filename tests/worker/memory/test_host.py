"""Host memory: exact sizes, and errors that say what to change."""

import errno
import mmap
import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conclave.worker.errors import ConfigError
from conclave.worker.memory.host import HostBlock, refusal, release


def test_a_block_has_the_bytes_asked_for() -> None:
    block = HostBlock(100_001)
    assert block.size == 100_001 and block.memory.dtype == torch.uint8
    assert block.memory.data_ptr() % resource.getpagesize() == 0
    block.memory.fill_(7)
    place = block.memory.data_ptr()
    block.trim(5_000)
    assert block.size == 5_000 and block.memory.data_ptr() == place and (block.memory == 7).all()
    block.close()
    assert block.size == 0


def test_a_kernel_without_huge_pages_has_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Pages)
    block = HostBlock(5000)
    assert block.size == 5000
    block.close()


def test_memory_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the host has no 1.05e\+06 GiB .* free some, or raise"):
        HostBlock(1 << 50)


def test_locking_is_undone_and_a_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def lock(place: int, size: int, flags: int) -> int:
        calls.append(("lock", place, size))
        return 0

    runtime = SimpleNamespace(
        cudaHostRegister=lock,
        cudaHostUnregister=lambda place: calls.append(("unlock", place)),
        cudaGetErrorString=lambda status: "out of memory",
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    block = HostBlock(5000)
    place = block.memory.data_ptr()
    block.lock()
    block.close()
    block.close()
    assert calls == [("lock", place, 5000), ("unlock", place)]
    runtime.cudaHostRegister = lambda *_: 2
    refused = HostBlock(1 << 20)
    with pytest.raises(ConfigError, match=r"does not lock .* \(out of memory\).*`ulimit -l`"):
        refused.lock()
    refused.close()
    assert len(calls) == 2


def test_a_refusal_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    assert "may lock 0.00781 GiB" in refusal(1 << 30, "why")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert "may lock unlimited" in refusal(1 << 30, "why")


def test_blocks_are_released_though_the_device_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    block = HostBlock(5000)
    release([block], torch.device("cuda"))
    assert block.size == 0
