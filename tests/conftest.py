# SPDX-License-Identifier: Apache-2.0
"""Every test starts from the same seeds, and may choose an instruction set and a number of threads."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedpai_kernels
from fedpai_kernels import _C
from fedpai_kernels.cuda import aggregate as cuda_aggregate
from fedpai_kernels.cuda import arguments, library
from fedpai_kernels.nn import convert
from fedpai_kernels.tuning import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]

# What a developer's machine measured decides nothing here. For the processes that tests start as well.
os.environ["FEDPAI_TUNING"] = "off"


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy generator is what code outside this repository draws from
    torch.manual_seed(0)


@pytest.fixture(params=fedpai_kernels.compiled_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this library was compiled for, where the CPU has it."""
    name: str = request.param
    present = fedpai_kernels.available_isas()
    if name not in present:
        pytest.skip(f"{name} is compiled in, but this CPU has only {', '.join(present)}")
    before = fedpai_kernels.isa()
    fedpai_kernels.set_isa(name)
    yield name
    fedpai_kernels.set_isa(before)


@pytest.fixture(params=["tiled", "streamed"])
def walk(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per walk of the convolution, instead of the one that its cost model would choose."""
    before = _C.walk()
    _C.force_walk(request.param)
    yield request.param
    _C.force_walk(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of torch and of the kernels, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> library.Library:
    """A library of the CUDA kernels' interface whose device is the CPU: csrc/tests/cuda_host_library.cpp, compiled."""
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


@pytest.fixture
def merging_on_host(on_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of fedpai_kernels/cuda/aggregate.py take tensors of the CPU where they expect those of a device."""
    check_tensor = arguments.check_tensor

    def check(name: str, given: object, dtype: torch.dtype, rank: int, device: torch.device | None = None) -> Tensor:
        return check_tensor(name, given, dtype, rank, device or torch.device("cpu"))

    for module in (arguments, cuda_aggregate):
        monkeypatch.setattr(module, "check_tensor", check)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shared out among processes, long tests come first, so that no process has one left while the others are done."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure says which one command repeats it."""
    report = yield
    if report.failed:
        report.sections.append(("reproduce", f"{sys.executable} -m pytest {item.nodeid!r}"))
    return report


@pytest.fixture
def dense_from_eight_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break-evens under which layers denser than 0.8 are left to torch, whatever the structure of their masks."""
    figures = dataclasses.replace(BUILT_IN, blocks=0.8, linear_blocks=0.35)
    monkeypatch.setattr(convert, "break_evens", lambda: figures)
