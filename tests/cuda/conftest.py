# SPDX-License-Identifier: Apache-2.0
"""A library of the CUDA kernels' interface whose device is the CPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fedpai_kernels.cuda import library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> library.Library:
    """csrc/tests/cuda_host_library.cpp, compiled."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("cuda") / "libfedpai_cuda_host.so"
    source = ROOT / "csrc" / "tests" / "cuda_host_library.cpp"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-I", str(ROOT / "csrc"), "-I", str(source.parent)]
    done = subprocess.run([*command, str(source), "-o", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library.Library(path)


@pytest.fixture
def on_host(host_library: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be launched on a device is run on the CPU."""

    @contextmanager
    def on(device: torch.device) -> Iterator[tuple[library.Library, int]]:
        yield host_library, 0

    monkeypatch.setattr(library, "on", on)
