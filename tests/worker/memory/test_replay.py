"""Replays of traces: by hand where they are short, and nobody beats who knows the future."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from conclave.worker.memory.experts.replay import at_best, by_age, by_policy


def trace_of(rows: list[list[int]]) -> torch.Tensor:
    """One layer, so many choices a step."""
    return torch.tensor(rows)[:, None]


def test_traces_that_are_done_by_hand() -> None:
    cycle = trace_of([[0], [1], [2]] * 5)
    assert by_age(cycle, 3, 3).misses == 3 and at_best(cycle, 3, 3).hits == 12
    two = torch.stack([torch.tensor([[0], [0]])] * 6)  # the same expert in each of two layers
    assert by_policy(two, 1, 2).misses == at_best(two, 1, 2).misses == 2
    assert by_age(two, 1, 1).hits == at_best(two, 1, 1).hits == 0
    assert by_age(cycle, 3, 3, warm=3).rate == 1.0


@given(st.integers(0, 500), st.integers(1, 3), st.integers(2, 8), st.data())
def test_nobody_beats_who_knows_the_future(
    seed: int, layers: int, experts: int, data: st.DataObject
) -> None:
    draw = torch.Generator().manual_seed(seed)
    active = data.draw(st.integers(1, experts))
    keys = torch.rand(20, layers, experts, generator=draw) + torch.linspace(0, 1, experts)
    trace = keys.topk(active, -1).indices
    slots = data.draw(st.integers(experts, layers * experts))
    found = [replay(trace, experts, slots) for replay in (by_policy, by_age, at_best)]
    assert len({each.hits + each.misses for each in found}) == 1
    assert found[2].hits >= max(found[0].hits, found[1].hits)
