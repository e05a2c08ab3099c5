"""The Triton kernels, in processes of their own: interpreted on the CPU, and compiled for Hopper.

Where there is a GPU the compiled kernels also run, on the same cases.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreted", "compiled"])
def test_triton_tiles(interpreted, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
