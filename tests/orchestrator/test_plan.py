from collections.abc import Mapping, Sequence

from conclave.orchestrator.config import Surge
from conclave.orchestrator.fleet.plan import (
    RELAUNCH_SECONDS,
    SETTLE_SECONDS,
    Action,
    Copy,
    History,
    Launch,
    Observation,
    Phase,
    Stop,
    Wanted,
    face,
    is_lost,
    launched,
    outdated_groups,
    plan,
    remember,
)

ABSENT = Observation(Phase.ABSENT)
STARTING = Observation(Phase.STARTING)
READY = Observation(Phase.READY, "host:1", "first")
DRAINING = Observation(Phase.DRAINING, "host:1", "first")
FAILED = Observation(Phase.FAILED, reason="bad checkpoint")

A, B, C = Copy("a", "1"), Copy("b", "1"), Copy("c", "1")
A2, B2 = Copy("a", "2"), Copy("b", "2")
LONG_READY = History(ready_once=True, ready_at=-100.0)


def want(names: str, version: str = "1", surge: Surge = "auto") -> dict[str, Wanted]:
    return {name: Wanted(version, "group", surge) for name in names}


def test_launches_what_is_missing_in_order() -> None:
    assert plan(want("ba"), {}, {}, now=0.0) == [Launch(B), Launch(A)]


def test_leaves_alone_what_runs() -> None:
    assert plan(want("ab"), {A: READY, B: STARTING}, {}, now=0.0) == []


def test_stops_what_is_not_wanted_now() -> None:
    observed = {C: READY, B: STARTING, Copy("d", "1"): ABSENT, Copy("e", "1"): FAILED}
    assert plan({}, observed, {}, now=0.0, known="abcde") == [Stop(B), Stop(C)]


def test_strangers_stay_until_all_others_serve_or_patience_ends() -> None:
    for seen, now, stopped in ((STARTING, 0.0, False), (STARTING, 9.0, True), (READY, 0.0, True)):
        actions = plan(want("a"), {A: seen, C: READY}, {}, now, known="a", patience_ends=5.0)
        assert actions == ([Stop(C)] if stopped else [])


def test_a_drain_that_another_supervisor_began_is_taken_over() -> None:
    assert plan(want("ab"), {A: DRAINING, B: READY}, {}, now=0.0) == [Stop(A)]
    assert plan(want("b"), {A: DRAINING, B: READY}, {}, now=0.0) == [Stop(A)]


def test_a_worker_that_never_started_is_lost() -> None:
    history = launched(History(), now=0.0)
    assert is_lost(FAILED, history)
    assert plan(want("a"), {A: FAILED}, {A: history}, now=1e9) == []


def test_a_worker_that_served_is_launched_again_after_a_pause() -> None:
    history = remember(READY, launched(History(), now=0.0), now=0.0)
    assert not is_lost(FAILED, history)
    for pause in (*RELAUNCH_SECONDS, RELAUNCH_SECONDS[-1]):
        launched_at = max(history.launched_at, 0.0)
        soon, late = launched_at + 0.99 * pause, launched_at + pause
        assert plan(want("a"), {A: FAILED}, {A: history}, soon) == []
        assert plan(want("a"), {A: ABSENT}, {A: history}, late) == [Launch(A)]
        history = launched(history, late)


def test_serving_again_forgets_the_failures() -> None:
    history = History(ready_once=True, launches=4, launched_at=10.0)
    again = remember(READY, history, now=20.0)
    assert (again.launches, again.ready_at) == (0, 20.0)
    assert remember(READY, again, now=30.0) == again
    assert remember(STARTING, again, now=30.0).ready_at is None, "it has to settle anew"
    assert remember(STARTING, history, now=20.0) == history


class Rollout:
    """Two workers, a and b, that shall go from version 1 to version 2."""

    def __init__(self, surge: Surge) -> None:
        self.surge = surge
        self.observed: dict[Copy, Observation] = {A: READY, B: READY}
        self.history: dict[Copy, History] = {A: LONG_READY, B: LONG_READY}
        self.now = 0.0

    def step(self, *, room: bool = True) -> Sequence[Action]:
        """What is due, done at once: what is launched starts, what is stopped drains."""
        actions = plan(
            want("ab", "2", self.surge),
            self.observed,
            self.history,
            self.now,
            known="ab",
            room=["group"] if room else [],
        )
        for action in actions:
            begun = STARTING if isinstance(action, Launch) else DRAINING
            self.observed[action.copy] = begun
        return actions

    def ready(self, copy: Copy) -> None:
        self.observed[copy] = READY
        self.history[copy] = remember(READY, History(), self.now)

    def ended(self, copy: Copy) -> None:
        del self.observed[copy]


def test_an_update_starts_the_new_copy_before_the_old_one_goes() -> None:
    rollout = Rollout("auto")
    assert rollout.step() == [Launch(A2)]
    assert rollout.step() == []
    rollout.ready(A2)
    assert rollout.step() == [], "other gateways may not know it yet"
    rollout.now += SETTLE_SECONDS
    assert rollout.step() == [Stop(A)]
    assert rollout.step() == [Stop(A)], "one at a time; a drain is repeated without harm"
    rollout.ended(A)
    assert rollout.step() == [Launch(B2)]
    rollout.ready(B2)
    rollout.now += SETTLE_SECONDS
    assert rollout.step() == [Stop(B)]
    rollout.ended(B)
    assert rollout.step() == []
    assert set(rollout.observed) == {A2, B2}


def test_an_update_without_room_stops_the_old_copy_first() -> None:
    for surge, room in (("auto", False), ("never", True)):
        rollout = Rollout("never" if surge == "never" else "auto")
        assert rollout.step(room=room) == [Stop(A)]
        assert rollout.step(room=room) == [Stop(A)], "b waits until a is back"
        rollout.ended(A)
        assert rollout.step(room=room) == [Launch(A2)]
        assert rollout.step(room=room) == []
        rollout.ready(A2)
        assert rollout.step(room=room) == [Stop(B)]


def test_an_update_may_insist_on_room() -> None:
    assert Rollout("always").step(room=False) == [Launch(A2)]


def test_an_update_that_fails_touches_nothing_further() -> None:
    rollout = Rollout("auto")
    assert rollout.step() == [Launch(A2)]
    rollout.observed[A2] = FAILED
    rollout.now = 1e6
    assert rollout.step() == []
    assert rollout.observed[A] == rollout.observed[B] == READY


def test_going_back_while_an_update_is_under_way() -> None:
    observed: Mapping[Copy, Observation] = {A: READY, B: READY, A2: STARTING}
    history = {A: LONG_READY, B: LONG_READY}
    assert plan(want("ab", "1"), observed, history, now=0.0) == [Stop(A2)]


def test_an_update_that_overtakes_another_goes_on_from_what_is_newest() -> None:
    observed = {A: READY, A2: READY, B: READY}
    history = {A: LONG_READY, A2: History(ready_once=True, ready_at=-1.0), B: LONG_READY}
    assert plan(want("ab", "3"), observed, history, now=0.0, room=["group"]) == [Stop(A)]
    assert face({A: READY, A2: READY}, "3", history) == (A2, READY)
    observed = {A: READY, A2: STARTING, B: READY}
    assert plan(want("ab", "3"), observed, history, now=0.0, room=["group"]) == [Stop(A2)]


def test_what_does_not_serve_is_replaced_first() -> None:
    observed = {A: READY, B: STARTING}
    assert plan(want("ab", "2"), observed, {A: LONG_READY}, now=0.0) == [Stop(B)]


def test_groups_are_updated_side_by_side() -> None:
    desired = {"a": Wanted("2", "one"), "b": Wanted("2", "two")}
    observed = {A: READY, B: READY}
    history = {A: LONG_READY, B: LONG_READY}
    assert outdated_groups(desired, observed) == {"one", "two"}
    actions = plan(desired, observed, history, now=0.0, room=["one"])
    assert actions == [Launch(A2), Stop(B)]


def test_the_face_of_a_worker_is_the_copy_that_serves() -> None:
    assert face({A: READY, A2: STARTING}, "2") == (A, READY)
    assert face({A: READY, A2: FAILED}, "2") == (A, READY)
    assert face({A: READY, A2: READY}, "2") == (A2, READY)
    assert face({A: DRAINING, A2: STARTING}, "2") == (A2, STARTING)
    assert face({A: DRAINING, A2: FAILED}, "2") == (A2, FAILED)
    assert face({A: FAILED, A2: FAILED}, "2") == (A2, FAILED)
