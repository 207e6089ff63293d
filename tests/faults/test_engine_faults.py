"""Every fault of real engines, once, under the work of many callers."""

from typing import Any

import pytest

from .engine_faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_survives(engine_stage: Any, fault: Any) -> None:
    engine_stage.survive(fault)
