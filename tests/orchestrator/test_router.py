import pytest

from conclave.orchestrator.routing.registry import Worker, WorkerState
from conclave.orchestrator.routing.router import ANY, Selector, Wish, WorkerNotFound, choose, turn


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
