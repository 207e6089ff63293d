"""Every fault of a fleet in a Ray cluster, once, under the work of many callers."""

from typing import Any

import pytest

from .ray_faults import FAULTS, hang_registry, kill_actor

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
LONG = [fault for fault in FAULTS if fault.inject in (kill_actor, hang_registry)]
SHORT = [fault for fault in FAULTS if fault not in LONG]


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: fault.name)
def test_survives(ray_stage: Any, fault: Any) -> None:
    ray_stage.survive(fault)


@pytest.mark.soak  # tests/cluster kills an actor in every run; the other one takes half a minute
@pytest.mark.parametrize("fault", LONG, ids=lambda fault: fault.name)
def test_survives_long(ray_stage: Any, fault: Any) -> None:
    ray_stage.survive(fault)
