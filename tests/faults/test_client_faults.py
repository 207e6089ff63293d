"""Every fault of callers, once, under the work of many callers."""

from typing import Any

import pytest

from .client_faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_survives(stub_stage: Any, fault: Any) -> None:
    stub_stage.survive(fault)
