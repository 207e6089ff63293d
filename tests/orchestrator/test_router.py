import pytest

from conclave.orchestrator.routing.registry import Worker, WorkerState
from conclave.orchestrator.routing.router import ANY, Selector, Wish, WorkerNotFound, choose, turn
from conclave.worker import Knobs
from conclave.worker.precision import Precision


def worker(
    name: str,
    load: int = 0,
    served: int = 0,
    state: WorkerState = WorkerState.SERVING,
    model: str = "m",
    **labels: str,
) -> Worker:
    return Worker(
        name, model=model, labels=labels, state=state, open_tokens=load, served_requests=served
    )


def chosen(workers: list[Worker], selector: Selector = ANY) -> str | None:
    found = choose(workers, Wish(selector), 0.0)
    return found.name if found else None


def test_least_work_then_fewest_served_then_name() -> None:
    assert chosen([worker("a", 2), worker("b", 1), worker("c", 1)]) == "b"
    assert chosen([worker("a", 1, served=9), worker("b", 1, served=3)]) == "b"
    assert chosen([worker("b"), worker("a")]) == "a"


@pytest.mark.parametrize("state", set(WorkerState) - {WorkerState.SERVING})
def test_only_serving_workers(state: WorkerState) -> None:
    assert chosen([worker("a", state=state), worker("b", 99)]) == "b"
    assert chosen([worker("a", state=state)]) is None


def test_conditions_hold_at_once() -> None:
    workers = [worker("a", tier="x"), worker("b", tier="y"), worker("c", model="n", tier="y")]
    assert chosen(workers, Selector(labels={"tier": "y"})) == "b"
    assert chosen(workers, Selector(model="n", labels={"tier": "y"})) == "c"
    assert chosen(workers, Selector(names=frozenset({"a", "c"}), model="n")) == "c"


def test_knobs_are_the_least_that_weights_must_be() -> None:
    pruned, small, full = (worker(name) for name in ("pruned", "small", "full"))
    pruned.precision = Precision(0.6875, 4, 2.75)
    small.precision = Precision(0, 8, 8.25)
    full.precision, full.open_tokens = Precision(0, 16, 16), 99
    workers = [pruned, small, full]
    assert chosen(workers, Selector(knobs=Knobs(sparsity=0.7))) == "pruned"
    assert chosen(workers, Selector(knobs=Knobs(sparsity=0.0))) == "small"
    assert chosen(workers, Selector(knobs=Knobs(weight_bits=8))) == "small"
    assert chosen(workers, Selector(knobs=Knobs(weight_bits=16))) == "full"
    with pytest.raises(WorkerNotFound) as caught:
        chosen(workers, Selector(frozenset({"pruned"}), knobs=Knobs(sparsity=0, weight_bits=8)))
    assert str(caught.value) == (
        "the fleet has no worker for: names pruned; knobs sparsity at most 0, weight_bits at least "
        "8 (there are pruned: 4-bit values, 68.8% pruned); see ListWorkers"
    )


def test_who_has_not_said_what_it_runs_may_turn_out_to_fit() -> None:
    asked = Selector(knobs=Knobs(weight_bits=8))
    assert chosen([worker("a", state=WorkerState.STARTING)], asked) is None
    with pytest.raises(WorkerNotFound):
        chosen([worker("a")], asked)  # it serves, and will not say


def test_nobody_known_fits() -> None:
    selector = Selector(frozenset({"z"}), "n", {"tier": "y"})
    with pytest.raises(WorkerNotFound, match="names z; model n; label tier=y"):
        choose([worker("a")], Wish(selector), 0.0)
    with pytest.raises(WorkerNotFound, match="any worker"):
        choose([], Wish(), 0.0)


def test_a_failed_turn_is_not_repeated_but_a_new_one_counts() -> None:
    a, b = worker("a"), worker("b", 5)
    tried = {turn(a)}
    assert choose([a, b], Wish(tried=tried), 0.0) is b
    assert choose([a], Wish(tried=tried), 0.0) is None
    a.epoch += 1
    assert choose([a, b], Wish(tried=tried), 0.0) is a
