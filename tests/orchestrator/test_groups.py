"""What a group of workers may say of its size, and when its workers are replaced."""

from typing import Any

import pytest

from conclave.orchestrator.config import FleetConfig, FleetConfigError, WorkerGroup

ONE: dict[str, Any] = {"name": "a", "engine": {"model": "m"}}


def parse(**keys: Any) -> FleetConfig:
    return FleetConfig.parse({"workers": [ONE | keys]}, source="fleet.yaml")


def group(**keys: Any) -> WorkerGroup:
    return parse(**keys).workers[0]


@pytest.mark.parametrize(
    ("keys", "smallest", "largest", "names"),
    [
        ({}, 1, 1, ["a"]),
        ({"replicas": 2}, 2, 2, ["a-0", "a-1"]),
        ({"min": 0, "max": 1}, 0, 1, ["a"]),
        ({"max": 2}, 1, 2, ["a-0", "a-1"]),
        ({"min": 2, "max": 3}, 2, 3, ["a-0", "a-1", "a-2"]),
    ],
)
def test_sizes(keys: dict[str, Any], smallest: int, largest: int, names: list[str]) -> None:
    made = group(**keys)
    assert (made.smallest, made.largest) == (smallest, largest)
    assert list(made.names()) == names


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"replicas": 1, "max": 2}, r"workers\[0\]: give `replicas`, or `min` and `max`, not both"),
        ({"min": 1}, "`min` needs a `max`; for a fixed number give `replicas`"),
        ({"min": 3, "max": 2}, "`min` is 3, more than `max`, which is 2"),
        ({"max": 0}, r"workers\[0\].max: .*greater than or equal to 1"),
        ({"target_load": 0}, r"workers\[0\].target_load: .*greater than 0"),
        ({"surge": "maybe"}, r"workers\[0\].surge: .*'auto', 'always' or 'never'"),
        ({"maximum": 3}, "unknown key"),
    ],
)
def test_errors(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FleetConfigError, match=message):
        parse(**keys)


def test_at_least_one_worker_of_every_group_is_declared_at_once() -> None:
    assert parse(min=0, max=3).first_names() == ("a-0",)
    assert parse(min=2, max=3).first_names() == ("a-0", "a-1")


def version(**keys: Any) -> str:
    return parse(**keys).specs()[0].version


@pytest.mark.parametrize(
    "keys",
    [
        {"engine": {"model": "other"}},
        {"engine": {"model": "m", "max_sequences": 3}},
        {"labels": {"tier": "x"}},
        {"resources": {"num_cpus": 2}},
        {"detached": True},
        {"revision": "2"},
    ],
)
def test_other_settings_are_another_version(keys: dict[str, Any]) -> None:
    assert version(**keys) != version()


def test_the_size_of_a_group_is_not_a_setting_of_its_workers() -> None:
    keys = {"max": 5, "target_load": 0.1, "drain_seconds": 3, "surge": "never"}
    assert version(**keys) == version()
    assert len({spec.version for spec in parse(max=3).specs()}) == 1
