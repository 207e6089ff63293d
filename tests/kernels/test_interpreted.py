"""The tests marked `kernel`, in a process whose kernels are interpreted on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is that process")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "kernel", str(Path(__file__).parent)]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
