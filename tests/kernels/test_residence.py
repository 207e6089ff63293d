"""Slots for experts: kernels decide as plain Python does, and whatever is asked is there."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conclave.kernels.errors import KernelInputError
from conclave.kernels.residence import fetch as fetching
from conclave.kernels.residence import reference
from conclave.kernels.residence.claim import claim
from conclave.kernels.residence.fetch import Fetcher
from conclave.kernels.residence.table import NEVER, UNIT, SlotTable, reused

CPU = torch.device("cpu")


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each has several chunks; and the interpreter runs one after the other."""
    monkeypatch.setattr(fetching, "_PROGRAMS", 3)


@st.composite
def runs(draw: st.DrawFn, most: int = 12) -> tuple[tuple[Any, ...], list[tuple[int, Tensor, bool]]]:
    """A table's sizes, and what is claimed of it: layer after layer, at times ahead."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    slots = draw(st.integers(experts, layers * experts + 2))
    half_life = draw(st.sampled_from([0.3, 2.0, 64.0]))
    claims: list[tuple[int, Tensor, bool]] = []
    for step in range(draw(st.integers(1, most))):
        tokens, active = draw(st.sampled_from([1, 1, 2, 9, 150])), draw(st.integers(1, experts))
        for ahead in (False, True) if draw(st.booleans()) else (False,):
            seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
            order = torch.rand(tokens, experts, generator=seed).argsort(-1)
            claims.append(((step + ahead) % layers, order[:, :active].contiguous(), ahead))
    return (layers, experts, slots, half_life), claims


def made(sizes: tuple[Any, ...], device: torch.device) -> SlotTable:
    layers, experts, slots, half_life = sizes
    return SlotTable.empty(layers, experts, slots, device, half_life)


def tensors(table: SlotTable) -> dict[str, Tensor]:
    """All but what is left on the list behind its end."""
    found = {each.name: getattr(table, each.name) for each in fields(table)}
    return {
        name: own.cpu()
        for name, own in found.items()
        if isinstance(own, Tensor) and name != "fetches"
    }


@given(runs())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_is_in_a_slot_of_its_own(run: Any) -> None:
    sizes, claims = run
    table = made(sizes, CPU)
    running: list[int] = []
    for layer, chosen, ahead in claims:
        before = table.slot_of.tolist()
        reference.claim(table, layer, chosen, ahead)
        needed = [layer * table.experts + each for each in chosen.unique().tolist()]
        places, owner = table.slot_of.tolist(), table.owner.tolist()
        held = [each for each in owner if each >= 0]
        assert len(set(held)) == len(held) == sum(place >= 0 for place in places)
        assert all(places[each] == slot for slot, each in enumerate(owner) if each >= 0)
        fetched = reference.wanted(table)
        assert all(owner[slot] == each and before[each] < 0 for each, slot in fetched)
        if not ahead:
            running = needed
            assert {each for each, _ in fetched} == {each for each in needed if before[each] < 0}
        else:  # what runs stays, and what is foreseen and there already
            stays = [*running, *(each for each in needed if before[each] >= 0)]
            assert all(places[each] == before[each] for each in stays)
        assert all(places[each] >= 0 for each in running)


@pytest.mark.kernel
@given(runs(4))
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_kernels_decide_and_fetch_as_plain_python(run: Any) -> None:
    sizes, claims = run
    ours, wanted = made(sizes, here()), made(sizes, CPU)
    stacks, plain = storage(wanted, here()), storage(wanted, CPU)
    blocks = [bytes_of(wanted.experts, layer) for layer in range(wanted.layers)]
    rows = [own.data_ptr() + 1024 * each for own in blocks for each in range(wanted.experts)]
    fetcher = Fetcher(torch.tensor(rows, device=here()), stacks, OFFSETS)
    for layer, chosen, ahead in claims:
        claim(ours, layer, chosen.to(here()), ahead)
        reference.claim(wanted, layer, chosen, ahead)
        expected = tensors(wanted)
        for name, own in tensors(ours).items():
            assert torch.equal(own, expected[name]), name
        assert reference.wanted(ours) == reference.wanted(wanted)
        for poison in (True, False):
            fetcher.fetch(ours.fetches, poison)
            reference.fetch(wanted, blocks, plain, OFFSETS, poison)
            for own, other in zip(stacks, plain, strict=True):
                assert torch.equal(own.cpu(), other)


OFFSETS, SIZES = (0, 256, 768), (48, 512, 16)


def storage(table: SlotTable, device: torch.device) -> list[Tensor]:
    """Slots for the parts of an expert, on 16 bytes."""
    return [
        torch.zeros(table.slots, size // 8, dtype=torch.int64, device=device).view(torch.uint8)
        for size in SIZES
    ]


def bytes_of(experts: int, seed: int) -> Tensor:
    """uint8 [experts, 1024] that a device can read."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1 << 60, (experts, 128), generator=draw).view(torch.uint8)
    return drawn.pin_memory() if torch.cuda.is_available() else drawn


@pytest.mark.kernel
@pytest.mark.parametrize("size", [16, 16384, 16400, 50000 // 16 * 16])
def test_parts_of_all_sizes_arrive_whole(size: int) -> None:
    """One chunk, some, and one that is not full; two experts of one list. And back again."""
    table = SlotTable.empty(1, 3, 3, here())
    claim(table, 0, torch.tensor([[0, 2]], device=here()))
    words = torch.randint(1 << 60, (3, 32 + size // 8))
    words = words.pin_memory() if torch.cuda.is_available() else words
    stacks = [
        torch.zeros(3, each // 8, dtype=torch.int64, device=here()).view(torch.uint8)
        for each in (16, size)
    ]
    row = words.shape[1] * 8
    addresses = torch.tensor([words.data_ptr() + row * each for each in range(3)], device=here())
    Fetcher(addresses, stacks, (0, 256)).fetch(table.fetches)
    source = words.view(torch.uint8)
    for expert, slot in ((0, 0), (2, 1)):
        assert torch.equal(stacks[0][slot].cpu(), source[expert, :16])
        assert torch.equal(stacks[1][slot].cpu(), source[expert, 256:])
    assert not stacks[1][2].any()
    back = torch.zeros(words.shape, dtype=torch.int64, device=here())
    places = back.data_ptr() + row * torch.arange(3, device=here())
    Fetcher(places, stacks, (0, 256)).collect(table.fetches)
    for own, its in zip(back.view(torch.uint8).cpu(), source, strict=True):
        came = torch.equal(own[:16], its[:16]) and torch.equal(own[256:], its[256:])
        assert came or not own.any()
    assert back.any(1).tolist() == [True, False, True]


def test_worth_is_how_often_and_how_lately() -> None:
    once, twice = reused(NEVER, 5 * UNIT), reused(reused(NEVER, 5 * UNIT), 5 * UNIT)
    assert (once, twice) == (5 * UNIT, 6 * UNIT)  # twice as much, or one half-life later
    assert reused(once, 9 * UNIT) == 9 * UNIT + UNIT // 16
    assert reused(twice, 0) == 6 * UNIT + UNIT // 64


def test_a_scan_leaves_what_was_worth_more() -> None:
    table = SlotTable.empty(2, 8, 12, CPU)
    for _ in range(4):
        for layer in range(2):
            reference.claim(table, layer, torch.tensor([[1, 2]]))
    for _ in range(3):
        for layer in range(2):
            reference.claim(table, layer, torch.arange(8)[None])
    assert all(table.slot_of[each] >= 0 for each in (1, 2, 9, 10))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(KernelInputError, match="as many as a layer has"):
        SlotTable.empty(3, 8, 7, CPU)
    table, words = SlotTable.empty(1, 2, 2, CPU), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(KernelInputError, match="no multiples of 16"):
        Fetcher(torch.zeros(2, dtype=torch.int64), [words.view(torch.uint8)], (0,))
    with pytest.raises(KernelInputError, match="contiguous"):
        claim(table, 0, torch.zeros(2, 2, dtype=torch.int64).t()[:1])
    with pytest.raises(KernelInputError, match="layer 1 of 1"):
        claim(table, 1, torch.zeros(2, 2, dtype=torch.int64))
