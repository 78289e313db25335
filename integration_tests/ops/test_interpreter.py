"""Runs the ops' tests under Triton's interpreter, which a process must choose before it imports triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sloth_kernels import launch


@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed: the ops run their references here")
def test_ops_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
