"""Where tests of Triton kernels run: on a GPU, or on the CPU in Triton's interpreter.

The interpreter is a matter of the whole process, and kernels cannot be compiled in such a process.
So `test_interpreted.py` runs the tests marked `kernel` in one of their own. To see one fail:

    TRITON_INTERPRET=1 python -m pytest tests/kernels -m kernel
"""

import functools
import inspect
import os
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from . import emulated_ptx

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def built_in(package: Any) -> list[str]:
    """What of a part of Triton's language the interpreter has its own form of."""
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def put_own_forms(package: Any, builder: Any, scope: Any) -> None:
    """As the interpreter does it, which looks through its whole language at every inner call.

    That was a quarter of the time of these tests. Forms are put in and taken out all at once.
    """
    for name in built_in(package):
        member = getattr(package, name)
        if not tl.core.is_builtin(member):
            return
        interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = put_own_forms


def emulate(
    _: Any, text: str, constraints: str, handles: list[Any], types: Any, pure: bool, pack: int
) -> emulated_ptx.Emulated:
    """Inline assembly, which the interpreter has not."""
    assert pack == 1
    made = emulated_ptx.run(text, constraints, [handle.data for handle in handles])
    kinds = {"float32": tl.float32, "int32": tl.int32}
    return emulated_ptx.Emulated(
        [interpreter.TensorHandle(own, kinds[str(own.dtype)]) for own in made]
    )


interpreter.InterpreterBuilder.create_inline_asm = emulate


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
