"""Runs the interpreted_*kernels.py in a process of their own.

Triton decides at its import whether kernels are interpreted. Set for the whole test run, the variable would
also reach the servers that other tests start, and tests on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "name", ["interpreted_kernels.py", "interpreted_dynamic_kernels.py", "interpreted_dynamic_backend.py"]
)
def test_kernels_under_the_interpreter(name: str) -> None:
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command,
        cwd=file.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
