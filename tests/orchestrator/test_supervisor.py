"""The supervisor against actors that are a dictionary."""

from collections.abc import Sequence
from typing import Any

from conclave.orchestrator.config import FleetConfig, WorkerSpec
from conclave.orchestrator.fleet.plan import Observation, Phase
from conclave.orchestrator.fleet.supervisor import Supervisor

READY = Observation(Phase.READY, "host:1", "first")
FAILED = Observation(Phase.FAILED, reason="bad checkpoint")


class FakeActors:
    def __init__(self) -> None:
        self.seen: dict[str, Observation] = {}
        self.done: list[tuple[Any, ...]] = []

    def launch(self, spec: WorkerSpec) -> None:
        self.done.append(("launch", spec.name))
        self.seen[spec.name] = Observation(Phase.STARTING)

    def observe(self) -> dict[str, Observation]:
        return dict(self.seen)

    def stop(self, names: Sequence[str], grace: float) -> None:
        self.done.append(("stop", *names, grace))
        for name in names:
            del self.seen[name]


class Scene:
    def __init__(self, *names: str) -> None:
        groups = [{"name": name, "engine": {"model": "m"}} for name in names]
        specs = FleetConfig.parse({"workers": groups}, source="test").specs()
        self.actors = FakeActors()
        self.told: list[tuple[str, Phase, bool]] = []
        self.now = 0.0
        self.supervisor = Supervisor(
            self.actors, specs, self.tell, grace=7.0, clock=lambda: self.now
        )

    def tell(self, name: str, seen: Observation, *, lost: bool) -> None:
        self.told.append((name, seen.phase, lost))

    def round(self) -> list[tuple[str, Phase, bool]]:
        self.told.clear()
        self.supervisor.round()
        return list(self.told)


def test_launches_once_and_reports() -> None:
    scene = Scene("a", "b")
    assert scene.round() == []
    assert scene.round() == [("a", Phase.STARTING, False), ("b", Phase.STARTING, False)]
    assert scene.actors.done == [("launch", "a"), ("launch", "b")]


def test_a_bad_constructor_is_reported_as_lost_and_not_repeated() -> None:
    scene = Scene("a")
    scene.round()
    scene.actors.seen["a"] = FAILED
    scene.now = 1e6
    assert scene.round() == [("a", Phase.FAILED, True)]
    assert scene.actors.done == [("launch", "a")]


def test_a_worker_that_served_is_brought_back() -> None:
    scene = Scene("a")
    scene.round()
    scene.actors.seen["a"] = READY
    scene.round()
    scene.actors.seen["a"] = FAILED
    scene.now = 100.0
    assert scene.round() == [("a", Phase.FAILED, False)]
    assert scene.actors.done == [("launch", "a"), ("launch", "a")]


def test_strangers_are_stopped() -> None:
    scene = Scene("a")
    scene.actors.seen = {"a": READY, "old": READY}
    scene.round()
    assert scene.actors.done == [("stop", "old", 7.0)]


def test_a_failing_round_does_not_end_the_thread(caplog: Any) -> None:
    scene = Scene("a")
    rounds: list[int] = []

    def observe() -> dict[str, Observation]:
        rounds.append(1)
        if len(rounds) == 1:
            raise ConnectionError("the head has gone")
        scene.supervisor._stopping.set()
        return {"a": READY}

    scene.actors.observe = observe  # type: ignore[method-assign]
    scene.supervisor.start()
    scene.supervisor.poke()
    scene.supervisor._thread.join(10.0)
    assert len(rounds) == 2 and scene.told == [("a", Phase.READY, False)]
    assert "could not look after the workers" in caplog.text
