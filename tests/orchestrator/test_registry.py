from conclave.orchestrator.routing.registry import Registry, Worker, WorkerState
from conclave.protos import gateway_pb2


def test_states_are_those_of_the_protocol() -> None:
    for state in WorkerState:
        assert gateway_pb2.WorkerState.Value(f"WORKER_STATE_{state.name}") == state


def test_life_of_a_worker() -> None:
    seen: list[WorkerState] = []
    registry = Registry(lambda worker: seen.append(worker.state))
    worker = registry.declare("a", model="m", labels={"k": "v"})
    assert worker.state is WorkerState.STARTING and worker.may_come_back
    assert registry.located("a", "host:1", "first", 11)
    assert not registry.located("a", "host:1", "first", 11)
    registry.serving("a")
    registry.draining("a")
    assert not worker.may_come_back
    registry.down("a", "connection lost")
    assert worker.may_come_back and worker.reason == "connection lost"
    registry.starting("a", "restarting")
    assert registry.located("a", "host:2", "second", 12)
    registry.serving("a")
    assert (worker.restarts, worker.epoch, worker.address, worker.reason) == (1, 2, "host:2", "")
    assert seen == [
        WorkerState.STARTING,
        WorkerState.SERVING,
        WorkerState.DRAINING,
        WorkerState.DOWN,
        WorkerState.STARTING,
        WorkerState.STARTING,
        WorkerState.SERVING,
    ]


def test_health_outweighs_ray() -> None:
    registry = Registry()
    worker = registry.declare("a")
    registry.located("a", "host:1", "first")
    registry.serving("a")
    registry.starting("a", "Ray says it restarts")
    assert worker.state is WorkerState.SERVING


def test_a_lost_worker_is_not_waited_for_until_it_is_found_again() -> None:
    registry = Registry()
    worker = registry.declare("a")
    registry.down("a", "bad checkpoint", lost=True)
    assert not worker.may_come_back
    registry.located("a", "host:1", "first")
    assert worker.may_come_back


def test_nothing_is_told_twice() -> None:
    told: list[Worker] = []
    registry = Registry(told.append)
    registry.declare("a")
    registry.located("a", "host:1", "first")
    registry.serving("a")
    registry.serving("a")
    assert len(told) == 2


def test_declared_once_and_forgotten() -> None:
    registry = Registry()
    assert registry.declare("a", model="m") is registry.declare("a", model="other")
    registry.forget("a")
    assert not registry.workers
