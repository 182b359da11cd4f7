# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled module with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment:
    FEDPAI_CMAKE_ARGS   extra arguments for the configure step, e.g. "-DFEDPAI_WERROR=ON".
    FEDPAI_BUILD_DIR    a CMake build folder to keep and reuse (incremental builds; the Makefile sets it).
                        Without it the build starts fresh every time.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found; `pip install cmake ninja` or use pip's build isolation")

        configure = [cmake]
        if not kept:
            # A tree that an isolated build left behind names tools inside a deleted environment.
            configure.append("--fresh")
        configure += [
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFEDPAI_MODULE_DIR={target.parent}",
            *shlex.split(os.environ.get("FEDPAI_CMAKE_ARGS", "")),
        ]
        build = [cmake, "--build", str(build_dir)]
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
