#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What ptxas says about the CUDA kernels: registers, shared memory and spills of each, for each architecture.

    tools/cuda_registers.py                          fails where a kernel spills
    tools/cuda_registers.py --write docs/gpu.md      also writes the table there, between its markers

Only nvcc is needed, no GPU. ctest runs the first form as `cuda_registers` where nvcc is found.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("conv2d/conv2d.cu", "norm/norm.cu", "aggregate/aggregate.cu", "optim/optim.cu")
ARCHITECTURES = ("80", "90")
# As cmake/cuda.cmake has them.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "-Xcompiler=-fPIC", "-I", str(ROOT / "csrc"))
BEGIN, END = "<!-- registers: tools/cuda_registers.py -->", "<!-- registers end -->"

# All that ptxas -v prints of a kernel.
COMPILING = re.compile(r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<architecture>\d+)a?'")
SPILLS = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<shared>\d+) bytes smem")


class Kernel(NamedTuple):
    """One kernel as compiled for one architecture; `stack` and `spilled` in bytes."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


def parse(text: str) -> list[Kernel]:
    """The kernels in what ``nvcc -Xptxas -v`` printed, in its order.

    Raises:
        ValueError: a kernel without its figures: ptxas prints something else than this reads.
    """
    kernels = []
    for part in re.split(r"(?=^.*Compiling entry function)", text, flags=re.MULTILINE):
        entry = COMPILING.search(part)
        if entry is None:
            continue
        spills, used, shared = SPILLS.search(part), USED.search(part), SHARED.search(part)
        if spills is None or used is None:
            raise ValueError(f"ptxas: no registers or spills are told of {entry['name']}:\n{part}")
        kernels.append(
            Kernel(
                entry["name"],
                entry["architecture"],
                int(used["registers"]),
                int(shared["shared"]) if shared else 0,
                int(spills["stack"]),
                int(spills["stores"]) + int(spills["loads"]),
            )
        )
    return kernels


def readable(names: Iterable[str]) -> dict[str, str]:
    """Kernels' names as they stand in the sources, ``conv2d_gather<float, 4, 2>``; as they are without c++filt."""
    mangled = list(dict.fromkeys(names))
    if shutil.which("c++filt") is None:
        return {name: name for name in mangled}
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    found = {}
    for name, whole in zip(mangled, done.stdout.splitlines(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|fedpai::cuda::|^void |\(fedpai::\w+\)(?=\d)", "", whole)
        found[name] = short[: short.index("(")] if "(" in short else short
    return found


def compile_all(nvcc: str) -> list[Kernel]:
    """Compiles every source for every architecture, and tells of the kernels under their readable names.

    Raises:
        subprocess.CalledProcessError: nvcc failed; its words are in `stderr`.
    """
    kernels = []
    targets = [word for a in ARCHITECTURES for word in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            command = [nvcc, *FLAGS, *targets, "-Xptxas", "-v", "-c", str(ROOT / "csrc" / "cuda" / source)]
            done = subprocess.run(
                [*command, "-o", str(Path(folder) / "kernels.o")], capture_output=True, text=True, check=True
            )
            kernels += parse(done.stderr + done.stdout)
    names = readable(kernel.name for kernel in kernels)
    return sorted(kernel._replace(name=names[kernel.name]) for kernel in kernels)


def version_of(nvcc: str) -> str:
    """nvcc's release, as ``13.0``."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release ([\d.]+)", done.stdout)
    return found[1] if found else "of an unknown release"


def table(kernels: list[Kernel], version: str) -> str:
    """The kernels as a table of Markdown."""
    columns = [f"sm_{a}" for a in ARCHITECTURES]
    lines = [
        f"Registers a thread, nvcc {version}.",
        "",
        f"| kernel | {' | '.join(columns)} | shared memory of a block, bytes | spilled, bytes |",
        f"|---|{'---|' * len(columns)}---|---|",
    ]
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    for name, found in by_name.items():
        registers = " | ".join(str(found[a].registers) for a in ARCHITECTURES)
        shared = max(kernel.shared for kernel in found.values())
        spilled = max(kernel.spilled for kernel in found.values())
        lines.append(f"| `{name}` | {registers} | {shared} | {spilled} |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Puts `text` between the markers of a document.

    Raises:
        ValueError: the document has no markers.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: expected the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 without spills, 1 with, 2 where nothing could be compiled."""
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of the CUDA kernels.")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler (nvcc)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a document with the table's markers")
    options = parser.parse_args(arguments)
    if shutil.which(options.nvcc) is None:
        print(f"{options.nvcc} was not found; --nvcc names it", file=sys.stderr)
        return 2
    try:
        kernels = compile_all(options.nvcc)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return 2
    text = table(kernels, version_of(options.nvcc))
    print(text)
    if options.write is not None:
        write(options.write, text)
    spilling = [kernel for kernel in kernels if kernel.spilled > 0 or kernel.stack > 0]
    for kernel in spilling:
        print(
            f"{kernel.name} for sm_{kernel.architecture}: {kernel.spilled} bytes spilled, "
            f"{kernel.stack} bytes of stack", file=sys.stderr,
        )  # fmt: skip
    if not kernels:
        print("ptxas told of no kernel", file=sys.stderr)
    return 1 if spilling or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
