"""House rules for all tests: memory that nobody wrote is NaN, GPU tests need a GPU.

Files that take longest come first, so that no process has one of them left when the others end.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

LONGEST = ("test_interpreted.py", "test_spills.py", "test_fuse_exact.py", "test_engine.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; GPU tests are skipped where there is none."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def nan_in_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill every `torch.empty` of floats with NaN, so that an unwritten output cannot pass."""
    empty = torch.empty
    with torch.device("meta"):  # which remembers, from its first use on, what makes tensors
        empty(0)

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type != "meta":
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", filled)
    yield
