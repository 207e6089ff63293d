"""Where tests of Triton kernels run: on a GPU, or on the CPU in Triton's interpreter.

The interpreter is a matter of the whole process, and kernels cannot be compiled in such a process.
So `test_interpreted.py` runs the tests marked `kernel` in one of their own. To see one fail:

    TRITON_INTERPRET=1 python -m pytest tests/kernels -m kernel
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or INTERPRETED:
        return
    for item in items:
        if item.get_closest_marker("kernel"):
            item.add_marker(pytest.mark.skip(reason="runs in test_interpreted.py"))


@pytest.fixture
def device() -> torch.device:
    """Where a kernel's tensors have to be."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def round_off() -> dict[torch.dtype, float]:
    """Relative error (2-norm) that an output of a dtype may have.

    The interpreter cuts float32 to bfloat16 where GPUs round, which doubles the error.
    """
    return {
        torch.float32: 2e-6,
        torch.float16: 3e-4,
        torch.bfloat16: 6e-3 if INTERPRETED else 3e-3,
    }
