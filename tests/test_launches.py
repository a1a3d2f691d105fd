"""What a GPU would be asked to launch, on fake tensors: in processes without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsb_kernels._op import triton

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("way", ["compiled", "traced"])
def test_every_op_launches_its_kernels(way: str) -> None:
    """Arguments bind and compile, and what torch.compile sees of an op are its kernels."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernel_launches", way]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "Encountered an exception" not in result.stderr
