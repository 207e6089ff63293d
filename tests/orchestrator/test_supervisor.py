"""The supervisor against actors that are a dictionary."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from conclave.orchestrator.config import FleetConfig, WorkerSpec
from conclave.orchestrator.fleet.plan import Copy, Observation, Phase
from conclave.orchestrator.fleet.supervisor import ASLEEP, Supervisor

READY = Observation(Phase.READY, "host:1", "first")
FAILED = Observation(Phase.FAILED, reason="bad checkpoint")

Told = tuple[str, Phase | None, bool]


class FakeActors:
    def __init__(self) -> None:
        self.seen: dict[Copy, Observation] = {}
        self.done: list[tuple[Any, ...]] = []
        self.requests: list[list[str]] = []
        self.leads = True
        self.has_room = True

    def lead(self) -> bool:
        return self.leads

    def launch(self, spec: WorkerSpec) -> None:
        self.done.append(("launch", spec.name))
        self.seen[Copy(spec.name, spec.version)] = Observation(Phase.STARTING)

    def observe(self) -> dict[Copy, Observation]:
        return dict(self.seen)

    def retire(self, copy: Copy, grace: float | None) -> None:
        if self.seen[copy].phase is not Phase.DRAINING:
            self.done.append(("retire", copy.worker, grace))
        self.seen[copy] = replace(self.seen[copy], phase=Phase.DRAINING)

    def room(self, spec: WorkerSpec) -> bool:
        return self.has_room

    def request(self, specs: Sequence[WorkerSpec]) -> None:
        names = [spec.name for spec in specs]
        if self.requests[-1:] != [names]:
            self.requests.append(names)


def fleet(*groups: dict[str, Any]) -> FleetConfig:
    parsed = [{"engine": {"model": "m", "max_sequences": 10}} | group for group in groups]
    return FleetConfig.parse({"workers": parsed}, source="test")


def simple(*names: str) -> FleetConfig:
    return fleet(*({"name": name} for name in names))


class Scene:
    def __init__(self, config: FleetConfig) -> None:
        self.actors = FakeActors()
        self.told: list[Told] = []
        self.now = 0.0
        self.waiting = 0
        self.config = config
        self.supervisor = Supervisor(
            self.actors,
            config,
            self.tell,
            waiting=lambda: self.waiting,
            clock=lambda: self.now,
        )

    def tell(self, name: str, seen: Observation | None, *, lost: bool) -> None:
        self.told.append((name, seen.phase if seen is not None else None, lost))

    def round(self, seconds: float = 1.0) -> list[Told]:
        self.now += seconds
        self.told.clear()
        self.actors.done.clear()
        self.supervisor.round()
        return list(self.told)

    def copy(self, name: str, config: FleetConfig | None = None) -> Copy:
        (spec,) = (s for s in (config or self.config).specs() if s.name == name)
        return Copy(name, spec.version)

    def see(self, name: str, seen: Observation, config: FleetConfig | None = None) -> None:
        self.actors.seen[self.copy(name, config)] = seen

    def ended(self) -> None:
        """Those that drain have come to their end."""
        for copy, seen in list(self.actors.seen.items()):
            if seen.phase is Phase.DRAINING:
                del self.actors.seen[copy]


def test_launches_once_and_reports() -> None:
    scene = Scene(simple("a", "b"))
    assert scene.round() == []
    assert scene.actors.done == [("launch", "a"), ("launch", "b")]
    assert scene.round() == [("a", Phase.STARTING, False), ("b", Phase.STARTING, False)]
    assert scene.actors.done == []


def test_a_bad_constructor_is_reported_as_lost_and_not_repeated() -> None:
    scene = Scene(simple("a"))
    scene.round()
    scene.see("a", FAILED)
    assert scene.round(1e6) == [("a", Phase.FAILED, True)]
    assert scene.actors.done == []


def test_a_worker_that_served_is_brought_back() -> None:
    scene = Scene(simple("a"))
    scene.round()
    scene.see("a", READY)
    scene.round()
    scene.see("a", FAILED)
    assert scene.round(100.0) == [("a", Phase.FAILED, False)]
    assert scene.actors.done == [("launch", "a")]


def test_strangers_are_stopped_and_forgotten() -> None:
    scene = Scene(simple("a"))
    scene.see("a", READY)
    scene.actors.seen[Copy("old", "")] = READY
    assert scene.round() == [("a", Phase.READY, False), ("old", Phase.DRAINING, False)]
    assert scene.actors.done == [("retire", "old", None)]
    scene.ended()
    assert scene.round() == [("a", Phase.READY, False), ("old", None, False)]
    assert scene.round() == [("a", Phase.READY, False)]


def test_the_autoscaler_hears_of_what_is_missing_until_it_is_there() -> None:
    scene = Scene(simple("a", "b"))
    scene.see("a", READY)
    scene.round()
    assert scene.actors.requests == [["a", "b"]]
    scene.see("b", READY)
    scene.round()
    assert scene.actors.requests == [["a", "b"], []]


def test_the_request_is_taken_back_at_the_end() -> None:
    scene = Scene(simple("a"))
    scene.supervisor.start()
    while not scene.actors.requests:
        time.sleep(0.01)
    scene.supervisor.stop()
    assert scene.actors.requests == [["a"], []]


def test_a_group_wakes_grows_and_goes_to_sleep() -> None:
    group = {"name": "w", "min": 0, "max": 3, "target_load": 0.5, "scale_down_after_seconds": 10}
    scene = Scene(fleet(group | {"drain_seconds": 60}))
    assert scene.round() == [("w-0", ASLEEP.phase, False)]
    assert scene.actors.done == []
    scene.waiting = 1
    scene.round()
    assert scene.actors.done == [("launch", "w-0")]
    scene.waiting = 0
    scene.see("w-0", replace(READY, open_sequences=11))
    scene.round()
    assert scene.actors.done == [("launch", "w-1"), ("launch", "w-2")]
    for name in ("w-0", "w-1", "w-2"):
        scene.see(name, READY)
    scene.round(9.0)
    assert scene.actors.done == []
    scene.see("w-1", replace(READY, open_sequences=1))
    told = scene.round()
    assert told[1:] == [("w-1", Phase.DRAINING, False), ("w-2", Phase.DRAINING, False)]
    assert scene.actors.done == [("retire", "w-1", 60.0), ("retire", "w-2", 60.0)]
    scene.ended()
    assert scene.round()[1:] == [("w-1", None, False), ("w-2", None, False)]
    scene.round(11.0)
    scene.ended()
    assert scene.round() == [("w-0", ASLEEP.phase, False)]


def test_an_ask_while_the_last_worker_drains_starts_another() -> None:
    group = {"name": "w", "min": 0, "max": 2, "scale_down_after_seconds": 0}
    scene = Scene(fleet(group))
    scene.see("w-0", READY)
    scene.round()
    scene.round()
    scene.waiting = 1
    scene.round()
    assert scene.actors.done == [("launch", "w-1")]


def test_workers_found_at_the_start_are_not_thrown_away() -> None:
    scene = Scene(fleet({"name": "w", "min": 0, "max": 3, "scale_down_after_seconds": 10}))
    scene.see("w-0", READY)
    scene.see("w-1", READY)
    scene.round()
    assert scene.actors.done == []
    scene.round(11.0)
    assert [done[:2] for done in scene.actors.done] == [("retire", "w-0"), ("retire", "w-1")]


def test_a_follower_only_looks_until_the_lead_is_free() -> None:
    scene = Scene(fleet({"name": "w", "min": 1, "max": 3}))
    scene.actors.leads = False
    assert scene.round() == [("w-0", ASLEEP.phase, False)]
    scene.see("w-0", READY)
    scene.see("w-2", READY)
    assert scene.round() == [("w-0", Phase.READY, False), ("w-2", Phase.READY, False)]
    del scene.actors.seen[scene.copy("w-2")]
    assert scene.round() == [("w-0", Phase.READY, False), ("w-2", None, False)]
    assert scene.actors.done == [] and scene.actors.requests == []
    scene.actors.seen.clear()
    scene.actors.leads = True
    scene.round()
    assert scene.actors.done == [("launch", "w-0")]


def test_one_that_may_not_lead_never_asks_for_it() -> None:
    actors = FakeActors()
    supervisor = Supervisor(actors, simple("a"), Scene(simple("a")).tell, may_lead=False)
    supervisor.round()
    assert actors.done == []


def test_an_update_replaces_workers_one_by_one(caplog: Any) -> None:
    old, new = (fleet({"name": "w", "replicas": 2, "revision": word}) for word in ("1", "2"))
    scene = Scene(old)
    scene.see("w-0", READY)
    scene.see("w-1", READY)
    scene.round()
    scene.supervisor.update(new)
    for name, other in (("w-0", "w-1"), ("w-1", "w-0")):
        scene.round()
        assert scene.actors.done == [("launch", name)]
        assert (name, Phase.READY, False) in scene.round(), "the old one serves until then"
        scene.see(name, READY, new)
        scene.round()
        scene.round(10.0)
        assert scene.actors.done == [("retire", name, None)]
        assert (other, Phase.READY, False) in scene.told
        assert (name, Phase.READY, False) in scene.told, "it has its new face"
        scene.ended()
    assert set(scene.actors.seen) == {scene.copy("w-0", new), scene.copy("w-1", new)}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_update_that_fails_is_told_and_stops(caplog: Any) -> None:
    old, new = (fleet({"name": "w", "replicas": 2, "revision": word}) for word in ("1", "2"))
    scene = Scene(old)
    scene.see("w-0", READY)
    scene.see("w-1", READY)
    scene.round()
    scene.supervisor.update(new)
    scene.round()
    scene.see("w-0", FAILED, new)
    for _ in range(3):
        assert scene.round(100.0) == [("w-0", Phase.READY, False), ("w-1", Phase.READY, False)]
        assert scene.actors.done == []
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "w-0 could not start with its new settings: bad checkpoint" in record.message
    scene.supervisor.update(old)
    scene.round()
    assert scene.actors.done == []


def test_a_failing_round_does_not_end_the_thread(caplog: Any) -> None:
    scene = Scene(simple("a"))
    rounds: list[int] = []

    def observe() -> dict[Copy, Observation]:
        rounds.append(1)
        if len(rounds) == 1:
            raise ConnectionError("the head has gone")
        scene.supervisor._stopping.set()
        return {scene.copy("a"): READY}

    scene.actors.observe = observe  # type: ignore[method-assign]
    scene.supervisor.start()
    scene.supervisor.poke()
    scene.supervisor._thread.join(10.0)
    assert len(rounds) == 2 and scene.told == [("a", Phase.READY, False)]
    assert "could not look after the workers" in caplog.text
