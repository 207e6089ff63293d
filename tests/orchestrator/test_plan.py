from conclave.orchestrator.fleet.plan import (
    RELAUNCH_SECONDS,
    History,
    Launch,
    Observation,
    Phase,
    Stop,
    is_lost,
    launched,
    plan,
    remember,
)

ABSENT = Observation(Phase.ABSENT)
STARTING = Observation(Phase.STARTING)
READY = Observation(Phase.READY, "host:1", "first")
FAILED = Observation(Phase.FAILED, reason="bad checkpoint")


def test_launches_what_is_missing_in_order() -> None:
    assert plan(["b", "a"], {}, {}, now=0.0) == [Launch("b"), Launch("a")]


def test_leaves_alone_what_runs() -> None:
    assert plan(["a", "b"], {"a": READY, "b": STARTING}, {}, now=0.0) == []


def test_stops_what_nobody_wants() -> None:
    observed = {"c": READY, "b": STARTING, "d": ABSENT, "e": FAILED}
    assert plan([], observed, {}, now=0.0) == [Stop("b"), Stop("c")]


def test_a_worker_that_never_started_is_lost() -> None:
    history = launched(History(), now=0.0)
    assert is_lost(FAILED, history)
    assert plan(["a"], {"a": FAILED}, {"a": history}, now=1e9) == []


def test_a_worker_that_served_is_launched_again_after_a_pause() -> None:
    history = remember(READY, launched(History(), now=0.0))
    assert not is_lost(FAILED, history)
    for pause in (*RELAUNCH_SECONDS, RELAUNCH_SECONDS[-1]):
        launched_at = max(history.launched_at, 0.0)
        soon, late = launched_at + 0.99 * pause, launched_at + pause
        assert plan(["a"], {"a": FAILED}, {"a": history}, soon) == []
        assert plan(["a"], {"a": ABSENT}, {"a": history}, late) == [Launch("a")]
        history = launched(history, late)


def test_serving_again_forgets_the_failures() -> None:
    history = History(ready_once=True, launches=4, launched_at=10.0)
    assert remember(READY, history).launches == 0
    assert remember(STARTING, history) == history
