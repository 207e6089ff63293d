"""Budgets divided up, and steps foretold."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from conclave.kernels.formats import Format
from conclave.worker import EngineConfig
from conclave.worker.errors import ConfigError
from conclave.worker.loading import formats_on_loading
from conclave.worker.memory.experts.slots import choose_slots
from conclave.worker.memory.forecast import BY_PROCESSORS, DECODES, H100, Rates, balance, forecast
from conclave.worker.memory.plan import Plan, plan_memory
from conclave.worker.memory.shapes import NAMES, shape_of
from conclave.worker.model.config import ModelConfig, cache_groups
from conclave.worker.model.storage import Storage, storage_of
from conclave.worker.running.inputs import DecodeShape
from conclave.worker.weights import blank_decoder

GIB = 2**30


def sizes(name: str, format: str | None) -> tuple[ModelConfig, Storage]:
    model = shape_of(name)
    blank = blank_decoder(model)
    formats = formats_on_loading(blank, None if format is None else Format.parse(format))
    return model, storage_of(blank, formats, torch.bfloat16, packed=True)


INT4_EXPERTS, SPARSE_EXPERTS = sizes("26b", "dense-int4-g64"), sizes("26b", "5:16-int4-g64")
DENSE, INT4, EXPERTS = sizes("31b", None), sizes("31b", "dense-int4-g64"), sizes("26b", None)


def plan_of(model: ModelConfig, storage: Storage, budget: float, **fields: object) -> Plan:
    config = EngineConfig.model_validate(
        {"model": "m", "max_sequences": 8, "max_step_tokens": 64, "max_context": 4096, **fields}
    )
    bytes_each = [group.bytes_per_token(2) for group in cache_groups(model)]
    return plan_memory(config, model, storage, int(budget), 2, bytes_each)


def knobs(**fields: object) -> dict[str, object]:
    return {"knobs": {"memory_budget": 1, **fields}}


def test_shapes_are_those_of_the_models() -> None:
    counts = {
        name: sum(p.numel() for p in blank_decoder(shape_of(name)).parameters()) for name in NAMES
    }
    assert abs(counts["31b"] - 30.697e9) < 2e6 and abs(counts["26b"] - 25.233e9) < 2e6
    assert shape_of("31b", 4).layers[-1].window is None


@given(st.floats(4, 80))
def test_a_budget_is_used_and_never_exceeded(budget: float) -> None:
    for model, storage in (DENSE, INT4, EXPERTS):
        try:
            plan = plan_of(model, storage, budget * GIB)
        except ConfigError as error:
            assert "but the least for this model is" in str(error)
            continue
        taken = plan.rest + plan.step + plan.cache + plan.weights
        assert taken == plan.budget == int(budget * GIB) and plan.cache > 0


SLOTTED: dict[str, object] = {"knobs": {"memory_budget": 1, "weight_bits": 4}}


@given(st.floats(1.5, 30))
def test_experts_get_what_is_left(budget: float) -> None:
    model, storage = INT4_EXPERTS
    try:
        plan = plan_of(model, storage, budget * GIB, **SLOTTED)
    except ConfigError:
        return
    taken = plan.rest + plan.step + plan.cache + plan.weights
    assert taken == plan.budget == int(budget * GIB) and plan.cache > 0
    if plan.experts is None:
        return
    slots = plan.experts
    assert not plan.residency.streamed and 128 <= slots.slots < 30 * 128
    experts = sum(layer.expert_block for layer in storage.layers)
    assert slots.host_bytes == experts
    assert plan.weights == sum(each.block for each in storage.layers) - experts + slots.bytes


def test_where_experts_have_slots() -> None:
    model, storage = INT4_EXPERTS
    assert plan_of(model, storage, 24 * GIB, **SLOTTED).experts is None
    plans = [plan_of(model, storage, size * GIB, **SLOTTED) for size in (6, 8, 12)]
    slots = [plan.experts for plan in plans]
    assert all(slots) and [each.experts for each in slots if each] == [128] * 3
    share = [each.share for each in slots if each]
    assert share == sorted(share) and 0.3 < share[1] < 0.45
    found = [each.hit_rate for each in slots if each]
    assert found == sorted(found) and 0.8 < found[1] < 0.93
    assert plan_of(model, storage, 8 * GIB, stream_experts=False).experts is None
    one = {**SLOTTED, "max_sequences": 1, "max_context": 64}
    layers = {**one, "stream_experts": False}
    assert least_of(model, storage, **one) < least_of(model, storage, **layers)
    demand = one | knobs(prefetch=False)
    little = plan_of(model, storage, least_of(model, storage, **demand), **demand)
    assert little.residency.streamed and little.experts is None  # no room for a layer's slots
    model, storage = INT4
    plain = plan_of(model, storage, 16 * GIB, **SLOTTED)
    assert plain.experts is None and plain.residency.streamed


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("prefetch", [None, False])
@given(st.floats(2, 50), st.floats(1, 1.5))
@example(7, 1.125)  # where the cache begins to have a share
@example(46.2, 1.002)  # where few plain layers begin to be better than coded ones
def test_more_memory_makes_no_token_slower(
    prefetch: bool | None, experts: bool, sequences: int, budget: float, times: float
) -> None:
    fields = {"max_sequences": sequences, "stream_experts": experts, **knobs(prefetch=prefetch)}
    for model, storage in (EXPERTS, INT4_EXPERTS, SPARSE_EXPERTS):
        seconds: list[float] = []
        for size in (budget, budget * times):
            try:
                plan = plan_of(model, storage, size * GIB, **fields)
            except ConfigError:
                assert not seconds, "less was enough"
                continue
            own = plan.residency, plan.ahead, 1, H100, plan.experts
            seconds.append(forecast(model, storage, *own).seconds)
        assert seconds == sorted(seconds, reverse=True)


def least_of(model: ModelConfig, storage: Storage, **fields: object) -> int:
    """The fewest bytes that there is a plan for, to 1 MiB."""
    low, high = 1, 64 * GIB
    while high - low > 1 << 20:
        middle = (low + high) // 2
        try:
            plan_of(model, storage, middle, **fields)
            high = middle
        except ConfigError:
            low = middle
    return high


def test_experts_that_are_not_alike_have_no_slots() -> None:
    _, storage = INT4_EXPERTS
    other = replace(storage.layers[3], expert_parts=storage.layers[3].expert_parts[:2])
    layers = [*storage.layers[:3], other, *storage.layers[4:]]
    assert choose_slots(layers, 100 * GIB) is None
    dense = replace(other, experts=0, expert_block=0, expert_parts=())
    some = choose_slots([*storage.layers[:3], dense, *storage.layers[4:]], 8 * GIB)
    assert some is not None and some.layers == (0, 1, 2, *range(4, 30))


def test_a_token_waits_for_what_was_not_foreseen() -> None:
    model, storage = INT4_EXPERTS
    plan = plan_of(model, storage, 8 * GIB, **SLOTTED)
    assert plan.experts is not None
    ahead, demand = (
        forecast(model, storage, plan.residency, n, 1, H100, plan.experts) for n in (2, 0)
    )
    missed = 240 * (1 - plan.experts.hit_rate) * plan.experts.expert_bytes
    assert demand.transfer == pytest.approx(missed / (H100.link * BY_PROCESSORS))
    assert demand.compute < ahead.seconds < demand.seconds
    many = forecast(model, storage, plan.residency, 2, 4096, H100, plan.experts)
    absent = plan.experts.host_bytes * (1 - plan.experts.share)
    assert many.transfer == pytest.approx(absent / (H100.link * BY_PROCESSORS), rel=1e-3)


def test_what_products_work_in_counts_once_a_stream() -> None:
    library = 32 * 2**20
    for (model, storage), times, fields in (
        (INT4_EXPERTS, 2, {}),  # experts are foreseen on a stream of its own
        (INT4_EXPERTS, 1, {"stream_experts": False}),
        (INT4_EXPERTS, 1, knobs(prefetch=False)),
        (INT4, 1, {}),
    ):
        config = EngineConfig.model_validate({"model": "m", "max_context": 4096, **fields})
        bytes_each = [group.bytes_per_token(2) for group in cache_groups(model)]
        sizes = (config, model, storage, 40 * GIB, 2, bytes_each)
        assert plan_memory(*sizes, library).step == plan_memory(*sizes).step + times * library


def test_what_graphs_take_is_set_aside() -> None:
    """A stream more that multiplies, and no less than is kept for good: inputs and logits."""
    library = 32 * 2**20
    for (model, storage), rows, context in ((INT4, 64, 8192), (INT4_EXPERTS, 3, 1000)):
        settings = {"model": "m", "max_context": context, "max_sequences": rows}
        config, groups = EngineConfig.model_validate(settings), cache_groups(model)
        bytes_each = [group.bytes_per_token(2) for group in groups]
        sizes = (config, model, storage, 60 * GIB, 2, bytes_each, library)
        more = plan_memory(*sizes, graphs=True).step - plan_memory(*sizes).step - library
        widest = DecodeShape(rows, (-(-context // config.block_size),) * len(groups))
        kept = 8 * widest.numbers + 4 * rows * model.vocab_size
        assert kept < more < kept + 20 * rows * model.vocab_size + 2**28


def test_all_weights_stay_where_they_can() -> None:
    model, storage = INT4
    assert not plan_of(model, storage, 24 * GIB).residency.streamed
    plan = plan_of(model, storage, 16 * GIB)
    assert 0 < len(plan.residency.streamed) < 60 and plan.residency.slots == 3
    demand = plan_of(model, storage, 16 * GIB, **knobs(prefetch=False))
    assert demand.residency.slots == 1 and demand.residency.copied < plan.residency.copied


def test_more_memory_copies_less() -> None:
    model, storage = DENSE
    plans = [plan_of(model, storage, size * GIB) for size in range(8, 64)]
    copied = [plan.residency.copied for plan in plans]
    assert all(after <= before for before, after in pairwise(copied)) and copied[-1] == 0


def test_the_least_budget_that_is_told_is_the_least() -> None:
    model, storage = DENSE
    low, high = 1, 64 * GIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_of(model, storage, middle)
            high = middle
        except ConfigError as error:
            low, told = middle, str(error)
    assert "GiB the cache of one sequence" in told
    enough = re.search(r"the least for this model is (\S+) GiB", told)
    assert enough is not None and high <= float(enough[1]) * GIB < 1.01 * high
    assert plan_of(model, storage, float(enough[1]) * GIB).residency.streamed


def test_a_step_takes_the_longer_one_or_the_sum() -> None:
    model, storage = INT4
    residency = plan_of(model, storage, 12 * GIB).residency
    for tokens in (1, 64, 4096):
        ahead, demand = (forecast(model, storage, residency, n, tokens, H100) for n in (2, 0))
        assert ahead.seconds == max(ahead.compute, ahead.transfer)
        assert demand.seconds == ahead.compute + ahead.transfer
        assert demand.seconds / ahead.seconds == pytest.approx(ahead.gain) and 1 < ahead.gain <= 2
        assert ahead.limit == ("link" if tokens < 1000 else "compute")
    even = balance(model, storage, residency, H100)
    assert even is not None
    assert forecast(model, storage, residency, 2, even, H100).gain > 1.99
    fast = Rates(link=1e15, memory=1e12, compute=1e15)
    assert balance(model, storage, residency, fast) is None


SPARSE = sizes("31b", "5:16-int4-g128")


def test_layers_are_coded_where_that_copies_less() -> None:
    model, storage = SPARSE
    # Per 16 columns of a row: 5 bytes and a scale for 128, and 33 bits instead of the bytes.
    for layer in storage.layers:
        assert layer.block * 33 / 40 < layer.coded < layer.block
        assert layer.coded == pytest.approx(layer.block * (4.125 + 0.25) / (5 + 0.25), rel=1e-3)
    coded = plan_of(model, storage, 8 * GIB)
    plain = plan_of(model, storage, 8 * GIB, stream_coded=False)
    one, other = coded.residency, plain.residency
    # gate_up: 43,008 rows of 5,376 columns.
    weights = 43008 * 5376
    assert one.working == storage.largest_module == weights * 5 // 16 + weights // 128 * 2
    assert all(sum(layer.modules) == layer.block for layer in storage.layers)
    assert all(len(layer.coded_modules) == len(layer.modules) == 4 for layer in storage.layers)
    assert not other.working
    assert one.blocks == tuple(layer.coded for layer in storage.layers)
    assert one.parts == tuple(layer.coded_modules for layer in storage.layers)
    # A full layer has the largest of all parts.
    assert one.slot_bytes == max(one.blocks)
    assert (one.slots, other.slots) == (1, 3) and one.copied < 0.76 * other.copied
    for plan in (coded, plain):
        assert plan.rest + plan.step + plan.cache + plan.weights == 8 * GIB
    demand = plan_of(model, storage, 8 * GIB, **knobs(prefetch=False))
    assert demand.residency.slots == 1 and demand.residency.working
    # int4 with all columns has no shorter code.
    model, storage = INT4
    assert all(layer.coded == layer.block for layer in storage.layers)
    assert not plan_of(model, storage, 8 * GIB).residency.working


def test_decoding_takes_a_copy_of_all_weights() -> None:
    model, storage = SPARSE
    plan = plan_of(model, storage, 8 * GIB)
    own = plan.residency
    found = forecast(model, storage, own, 2, 1, H100)
    moved = sum(own.blocks) + sum(layer.block for layer in storage.layers)
    assert found.decode == pytest.approx(moved / (DECODES * 2.9e12))
    assert found.transfer == pytest.approx(own.copied / H100.link) and found.limit == "link"
    assert found.seconds == found.transfer > found.compute + found.decode
    demand = forecast(model, storage, own, 0, 1, H100)
    assert demand.seconds == found.compute + found.decode + found.transfer
    plain = plan_of(model, storage, 8 * GIB, stream_coded=False)
    assert forecast(model, storage, plain.residency, 2, 1, H100).decode == 0
    even = balance(model, storage, own, H100)
    later = balance(model, storage, plain.residency, H100)
    assert even is not None and later is not None and even < later


def test_few_tokens_read_few_experts() -> None:
    model, storage = EXPERTS
    residency = plan_of(model, storage, 64 * GIB).residency
    one, many = (forecast(model, storage, residency, 2, n, H100).compute for n in (1, 16))
    assert one < many / 3
    read = 2 * 3.82e9  # of the parameters that a token meets
    assert one == pytest.approx(read / H100.memory + 30 * H100.overhead, rel=0.1)
