"""Blocks go to the host and come back the same, every layer of theirs."""

import pytest
import torch

from conclave.worker.errors import ConfigError
from conclave.worker.model.config import CacheGroup
from conclave.worker.running import host_blocks
from conclave.worker.running.host_blocks import HostBlocks
from conclave.worker.scheduling.tier import Moves

CPU = torch.device("cpu")
GROUPS = (CacheGroup(None, (1, 4), 0), CacheGroup(8, (0,), 0))
NONE = Moves((), ())


def tensors(dtype: torch.dtype, block: int = 3) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of three layers, two of them in the first group; all numbers differ."""
    draw = torch.Generator().manual_seed(0)
    shapes = {1: (7, block, 2, 4), 4: (7, block, 1, 6), 0: (5, block, 1, 5)}
    return {
        layer: tuple(torch.randn(shape, generator=draw).to(dtype) for _ in range(2))  # type: ignore[misc]
        for layer, shape in shapes.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer", [1, 1 << 20])
def test_there_and_back(dtype: torch.dtype, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_blocks, "HOST_BUFFER", buffer)
    own = tensors(dtype)
    before = {layer: [each.clone() for each in pair] for layer, pair in own.items()}
    host = HostBlocks(own, GROUPS, (4, 2), CPU)
    host.exchange((Moves(((5, 0), (2, 3), (6, 1)), ()), Moves(((4, 1),), ())), wait=True)
    for pair in own.values():
        for each in pair:
            each.fill_(torch.nan)
    host.exchange((NONE, NONE), wait=True)
    back = (Moves((), ((1, 0), (3, 6), (0, 2))), Moves((), ((1, 3),)))
    host.exchange(back, wait=False)
    for layer, came in ((1, {0: 6, 6: 2, 2: 5}), (4, {0: 6, 6: 2, 2: 5}), (0, {3: 4})):
        for now, then in zip(own[layer], before[layer], strict=True):
            for block, source in came.items():
                assert torch.equal(now[block], then[source])
            rest = [block for block in range(len(now)) if block not in came]
            assert now[rest].isnan().all(), "no other block was written"
    host.close()


def test_slots_side_by_side_are_copied_together() -> None:
    assert host_blocks._runs([]) == []
    assert host_blocks._runs([3, 4, 5, 7, 9, 10]) == [(0, 3, 3), (3, 7, 1), (4, 9, 2)]


def test_a_block_may_go_and_another_come_in_one_step() -> None:
    own = tensors(torch.float32)
    host = HostBlocks(own, GROUPS, (2, 1), CPU)
    first, second = own[1][0][0].clone(), own[1][0][3].clone()
    host.exchange((Moves(((0, 0),), ()), NONE), wait=True)
    host.exchange((Moves(((3, 1),), ((0, 3),)), NONE), wait=True)
    assert torch.equal(own[1][0][3], first)
    host.exchange((Moves((), ((1, 0),)), NONE), wait=True)
    assert torch.equal(own[1][0][0], second)


def test_a_host_without_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_blocks, "host_memory", lambda: 100)
    with pytest.raises(ConfigError, match="kv_host_gib asks for"):
        HostBlocks(tensors(torch.float32), GROUPS, (4, 2), CPU)
