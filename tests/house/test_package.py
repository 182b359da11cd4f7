# SPDX-License-Identifier: Apache-2.0
"""What is declared about the distribution, and what a built one holds."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
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


@pytest.mark.slow
def test_wheel_from_source_archive(tmp_path: Path) -> None:
    """A source archive builds a wheel that holds what it must, and works away from the checkout."""
    pytest.importorskip("pybind11")
    # Unoptimised, because only completeness is asked here.
    environment = os.environ | {"FEDPAI_CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}
    make_archive = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", make_archive, str(tmp_path)], cwd=ROOT, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    built = subprocess.run(
        [*pip, "wheel", *offline, "-w", str(tmp_path), str(archive)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if re.fullmatch(r"fedpai_kernels/_C\.[\w-]+\.so", n)]
    for name in (
        "fedpai_kernels/py.typed",
        "fedpai_kernels/_C.pyi",
        "fedpai/py.typed",
        "fedpai/cli/__init__.py",
    ):
        assert name in names
    assert [n for n in names if not n.startswith(("fedpai_kernels", "fedpai/"))] == []
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedpai_kernels").rglob("*.py")}
    modules |= {path.relative_to(ROOT / "python").as_posix() for path in (ROOT / "python").rglob("*.py")}
    assert modules - set(names) == set()

    site = tmp_path / "site"
    subprocess.run(
        [*pip, "install", *offline, "--target", str(site), str(wheel)], check=True, capture_output=True
    )
    program = "import fedpai_kernels as k, fedpai as f; print(k.__file__, f.__file__, k.isa())"
    ran = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(site)}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(str(site)) == 2
