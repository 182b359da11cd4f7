# SPDX-License-Identifier: Apache-2.0
"""What is declared about the distribution, and what a built one holds."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fedpai
import fedpai_kernels

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "fedpai-kernels"


def build_requirements() -> str:
    found = re.search(r"^\[build-system\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert found
    return "".join(line for line in found[1].splitlines() if not line.startswith("#"))


def test_building_needs_no_torch() -> None:
    requirements = build_requirements()
    assert "pybind11" in requirements
    assert "torch" not in requirements


def test_kernels_depend_on_torch_and_numpy_only() -> None:
    requirements = importlib.metadata.requires(DISTRIBUTION) or []
    needed = {re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line}
    assert needed == {"torch", "numpy"}


def test_one_version() -> None:
    version = importlib.metadata.version(DISTRIBUTION)
    cmake = re.search(r"project\(fedpai_kernels VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert cmake
    assert {version, cmake[1], fedpai.__version__, fedpai_kernels.__version__} == {version}


def built_by_backend(hook: str, folder: Path, **environment: str) -> Path:
    """Calls one hook of the build backend in the checkout and returns the file that it made in ``folder``."""
    program = f"import setuptools.build_meta as backend; print(backend.{hook}({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.split()[-1]


@pytest.mark.alone
def test_source_archive_is_complete(tmp_path: Path) -> None:
    """It holds every file that is needed to build, test and document the package."""
    archive = built_by_backend("build_sdist", tmp_path)
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"CMakeLists.txt", "pyproject.toml", "setup.py", "Makefile", "README.md", "LICENSE"}
    for top in ("csrc", "cmake", "tools", "docs", "fedpai_kernels", "python", "tests"):
        files = (
            path for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
        needed |= {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".so"}
    assert sorted(needed - inside) == []
    assert [name for name in inside if name.endswith(".so")] == []


@pytest.mark.alone
@pytest.mark.slow
def test_wheel_is_complete_and_works_elsewhere(tmp_path: Path) -> None:
    """It holds the module, all packages and their types, nothing else, and runs away from the checkout."""
    pytest.importorskip("pybind11")
    # The checkout's own build tree: what is compiled already is only linked again.
    wheel = built_by_backend("build_wheel", tmp_path, FEDPAI_BUILD_DIR=str(ROOT / "build" / "cmake"))
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if re.fullmatch(r"fedpai_kernels/_C\.[\w-]+\.so", name)]
    for name in (
        "fedpai_kernels/py.typed",
        "fedpai_kernels/_C.pyi",
        "fedpai/py.typed",
        "fedpai/report/report.html.j2",
        "fedpai/report/compare.html.j2",
        "fedpai/report/style.css",
    ):
        assert name in names
    assert [name for name in names if not name.startswith(("fedpai_kernels", "fedpai/"))] == []
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedpai_kernels").rglob("*.py")}
    modules |= {path.relative_to(ROOT / "python").as_posix() for path in (ROOT / "python").rglob("*.py")}
    assert sorted(modules - set(names)) == []

    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    program = "import fedpai_kernels as k, fedpai as f; print(k.__file__, f.__file__, k.isa())"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(str(site)) == 2
