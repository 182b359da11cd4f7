# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled module with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment:
    FEDPAI_CMAKE_ARGS   extra arguments for the configure step, e.g. "-DFEDPAI_WERROR=ON".
    FEDPAI_BUILD_DIR    a CMake build folder to keep and reuse (incremental builds; the Makefile sets it).
                        Without it the build starts fresh every time.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """Path of cmake or ninja: that of this environment's package, on PATH or not, else the one on PATH."""
    folders = []
    with contextlib.suppress(ImportError):
        package = importlib.import_module(name)
        folders = [getattr(package, "CMAKE_BIN_DIR", None) or package.BIN_DIR]
    path = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if path is None:
        raise RuntimeError(f"{name} was not found; `pip install {name}`, or let pip isolate the build")
    return path


class CMakeExtension(Extension):
    """An extension whose sources are listed in CMakeLists.txt."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """`build_ext` that hands the work to CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configures, builds and installs one module to where setuptools expects it."""
        import pybind11

        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        kept = os.environ.get("FEDPAI_BUILD_DIR")
        build_dir = Path(kept).resolve() if kept else (ROOT / self.build_temp).resolve()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")

        configure = [cmake]
        if not kept:
            # A tree that an isolated build left behind names tools inside a deleted environment.
            configure.append("--fresh")
        configure += [
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFEDPAI_MODULE_DIR={target.parent}",
            *shlex.split(os.environ.get("FEDPAI_CMAKE_ARGS", "")),
        ]
        build = [cmake, "--build", str(build_dir), "--target", "place_module"]
        jobs = self.parallel or int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", 0)) or os.cpu_count() or 1
        build += ["--parallel", str(jobs)]

        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        for command in (configure, build):
            self.announce(shlex.join(command), level=2)
            subprocess.check_call(command)
        if not target.is_file():
            raise RuntimeError(f"the build ended without producing {target.name}")


setup(ext_modules=[CMakeExtension("fedpai_kernels._C")], cmdclass={"build_ext": CMakeBuild})
