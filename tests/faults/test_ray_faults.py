"""Every fault of a fleet in a Ray cluster, once, under the work of many callers."""

from typing import Any

import pytest

from .ray_faults import FAULTS, kill_actor

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
SHORT = [fault for fault in FAULTS if fault.inject is not kill_actor]
LONG = [fault for fault in FAULTS if fault.inject is kill_actor]


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: fault.name)
def test_survives(ray_stage: Any, fault: Any) -> None:
    ray_stage.survive(fault)


@pytest.mark.soak  # tests/cluster kills an actor in every run
@pytest.mark.parametrize("fault", LONG, ids=lambda fault: fault.name)
def test_survives_long(ray_stage: Any, fault: Any) -> None:
    ray_stage.survive(fault)
