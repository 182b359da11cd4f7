# SPDX-License-Identifier: Apache-2.0
"""The compiled module as a guest in a process: what it links, when it is imported, how it is chosen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from fedpai.cli.doctor import openmp_libraries
from fedpai_kernels import _C

# What the libgomp inside torch's wheels offers. It is older than the compiler's own, and whichever of the two
# is loaded first serves the whole process.
NEWEST_SYMBOL_VERSIONS = {"GOMP": (5, 0), "OMP": (3, 1), "GOACC": (2, 0)}

CONVOLVE = """
x = torch.ones(4, 3, 5, 5)
mask = torch.ones(2, 3, 3, 3, dtype=torch.bool)
plan = fedpai_kernels.Plan.from_mask(mask)
y = fedpai_kernels.ops.sparse_conv2d(x, torch.ones(plan.nnz), plan)
assert torch.equal(y, torch.full_like(y, 27.0)), y
"""


def symbols_of_module(which: str) -> str:
    if (nm := shutil.which("nm")) is None:
        pytest.skip("nm (Debian: binutils) is not installed")
    return subprocess.run([nm, "-D", which, _C.__file__], capture_output=True, text=True, check=True).stdout


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, fedpai_kernels",
        "import fedpai_kernels, torch",
        "import fedpai_kernels._C, torch, fedpai_kernels",
    ],
    ids=["torch_first", "kernels_first", "module_first"],
)
def test_import_order_and_one_openmp(imports: str) -> None:
    """Either order works, and one OpenMP runtime serves both."""
    done = python(f"{imports}\n{CONVOLVE}\nprint(open('/proc/self/maps').read())", FEDPAI_ISA="")
    assert done.returncode == 0, done.stderr
    assert len(openmp_libraries(done.stdout)) == 1


def test_needs_no_openmp_newer_than_torchs() -> None:
    versions = re.findall(r"@(GOMP|OMP|GOACC)_(\d+)\.(\d+)", symbols_of_module("--undefined-only"))
    assert versions, "the module links no OpenMP at all"
    newer = {f"{family}_{major}.{minor}" for family, major, minor in versions
             if (int(major), int(minor)) > NEWEST_SYMBOL_VERSIONS[family]}  # fmt: skip
    assert newer == set()


def test_exports_only_its_entry_point() -> None:
    names = {line.split()[-1] for line in symbols_of_module("--defined-only").splitlines()}
    assert [name for name in names if "fedpai" in name] == []
    assert "PyInit__C" in names


@pytest.mark.parametrize("isa", _C.available_isas())
def test_environment_forces_an_instruction_set(isa: str) -> None:
    done = python("import fedpai_kernels; print(fedpai_kernels.isa())", FEDPAI_ISA=isa)
    assert (done.returncode, done.stdout.strip()) == (0, isa), done.stderr


def test_unknown_instruction_set_is_refused() -> None:
    done = python(f"import torch, fedpai_kernels\n{CONVOLVE}", FEDPAI_ISA="avx1024")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: FEDPAI_ISA")
    assert "avx1024" in last
    assert "scalar" in last


def test_absent_instruction_set_is_refused() -> None:
    absent = sorted(set(_C.compiled_isas()) - set(_C.available_isas()))
    if not absent:
        pytest.skip("this CPU has every instruction set that was compiled in")
    done = python(f"import torch, fedpai_kernels\n{CONVOLVE}", FEDPAI_ISA=absent[0])
    assert done.returncode != 0
    assert re.search(rf"ValueError: FEDPAI_ISA: this CPU lacks .*{absent[0]}", done.stderr)
