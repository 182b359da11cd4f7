# SPDX-License-Identifier: Apache-2.0
"""The tests of the kernels, in Triton's interpreter: in a process of its own, for that is decided once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.checking import INTERPRETED, needs_triton

ROOT = Path(__file__).resolve().parents[2]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"TRITON_INTERPRET=1 {' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout
