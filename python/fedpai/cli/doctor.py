# SPDX-License-Identifier: Apache-2.0
"""``fedpai doctor``: what is installed, what this machine can run, and what to do about what is missing.

Nothing here may depend on a working installation: each examination catches what can go wrong in it and turns
it into a finding with a remedy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "note", "broken"]
_MARKS: dict[State, str] = {"ok": "ok", "note": "note", "broken": "BROKEN"}
_PROC = Path("/proc")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_OPENMP_LIBRARY = re.compile(r"lib(?:gomp|omp|iomp5)[^/]*\.so[^/]*$")


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        topic: what was looked at, e.g. "kernels".
        state: "ok"; "note" (works, but worth knowing); "broken" (nothing will run until it is repaired).
        text: what was found.
        remedy: what to do, empty where nothing is needed.
        facts: the same, machine-readable.
    """

    topic: str
    state: State
    text: str
    remedy: str
    facts: dict[str, Any]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the sub-command.

    Args:
        subparsers: what ``ArgumentParser.add_subparsers`` returned.
    """
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation and describe the machine",
        description="Check the installation and describe the machine; exit with 1 if it cannot work.",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the findings to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine, print, write JSON where asked. 1: something essential is broken; 2: FILE cannot be written."""
    findings = examine()
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{finding.topic:<{width}}  {_MARKS[finding.state]:<6}  {finding.text}")
        if finding.remedy:
            print(f"{'':<{width}}          -> {finding.remedy}")
    if args.json is not None:
        try:
            args.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
        except OSError as error:
            print(f"fedpai: --json: cannot write {args.json} ({error.strerror})", file=sys.stderr)
            return 2
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def examine() -> list[Finding]:
    """All findings. What rests on something broken is not examined: the first cause is what must be repaired."""
    examinations: tuple[tuple[str, Callable[[], Finding], tuple[str, ...]], ...] = (
        ("system", _system, ()),
        ("torch", _torch, ()),
        ("kernels", _kernels, ("torch",)),
        ("arithmetic", _arithmetic, ("torch", "kernels")),
        ("threads", _threads, ("torch",)),
        ("choice", _choice, ("torch", "kernels")),
        ("openmp", _openmp, ("torch",)),
        ("data", _data, ("torch",)),
        ("compiler", _compiler, ()),
    )
    findings: list[Finding] = []
    for topic, examination, needs in examinations:
        if any(finding.state == "broken" and finding.topic in needs for finding in findings):
            continue
        try:
            findings.append(examination())
        except Exception as error:  # a doctor reports what it meets instead of dying of it
            text = f"{type(error).__name__}: {error}"
            findings.append(Finding(topic, "broken", text, "", {"error": text}))
    return findings


def _system() -> Finding:
    caches = _cpu_caches()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "caches": caches,
        "memory_bytes": memory,
    }
    shown = ", ".join(f"{name} {size}" for name, size in caches.items()) or "caches unknown"
    text = f"Python {facts['python']}, {facts['cpu']} ({shown}), {memory / 2**30:.0f} GiB"
    return Finding("system", "ok", text, "", facts)


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:
        text = f"cannot be imported: {error}"
        return Finding("torch", "broken", text, "pip install torch==2.13.0", {"error": str(error)})
    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.is_available()}
    return Finding("torch", "ok", f"torch {facts['version']}", "", facts)


def _kernels() -> Finding:
    remedy = "in a source checkout: make build; else: pip install --force-reinstall --no-deps fedpai-kernels"
    forced = os.environ.get("FEDPAI_ISA") or None
    facts: dict[str, Any] = {"forced": forced, "version": importlib.metadata.version("fedpai-kernels")}
    try:
        import fedpai_kernels
        from fedpai_kernels import _C
    except Exception as error:
        if forced is not None and "FEDPAI_ISA" in str(error):
            remedy = "unset FEDPAI_ISA, or name one that is present"
        elif "FEDPAI_MEMORY_CACHE" in str(error):
            remedy = "unset FEDPAI_MEMORY_CACHE, or set it to 0 or 1"
        return Finding("kernels", "broken", str(error), remedy, facts | {"error": str(error)})
    facts |= {
        "module": _C.__file__,
        "compiled": list(_C.compiled_isas()),
        "available": list(_C.available_isas()),
        "memory_cache": fedpai_kernels.memory.ENABLED,
    }
    try:
        facts["chosen"] = fedpai_kernels.isa()
    except ValueError as error:
        remedy = "unset FEDPAI_ISA, or name one that is present"
        return Finding("kernels", "broken", str(error), remedy, facts | {"error": str(error)})
    why = "forced by FEDPAI_ISA" if forced else "the best one present"
    text = (
        f"fedpai-kernels {facts['version']}: uses {facts['chosen']} ({why}); "
        f"compiled: {', '.join(facts['compiled'])}; present: {', '.join(facts['available'])}"
        f"{'' if facts['memory_cache'] else '; memory cache off'}"
    )
    return Finding("kernels", "ok", text, "", facts)


def _arithmetic() -> Finding:
    """One small sparse convolution, forward and backward, against the dense one."""
    import torch

    import fedpai_kernels

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (5, 6, 7, 7), generator=generator).float().requires_grad_()
    weight = torch.randint(1, 4, (8, 6, 3, 3), generator=generator).float()
    mask = torch.rand(weight.shape, generator=generator) < 0.2
    plan = fedpai_kernels.Plan.from_mask(mask)
    dense = torch.nn.functional.conv2d(x, weight * mask, padding=1)
    (expected,) = torch.autograd.grad(dense.square().sum(), x)
    sparse = fedpai_kernels.ops.sparse_conv2d(x, weight[mask], plan, padding=1)
    (computed,) = torch.autograd.grad(sparse.square().sum(), x)
    # Small integers: every order of summation gives the same float32, so equality is the right question.
    if torch.equal(dense, sparse) and torch.equal(expected, computed):
        return Finding("arithmetic", "ok", "a sparse convolution equals the dense one", "", {"equal": True})
    text = "a sparse convolution differs from the dense one: this build computes wrong results"
    return Finding(
        "arithmetic", "broken", text, "rebuild (make clean build) and report this", {"equal": False}
    )


def _threads() -> Finding:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    environment = os.environ.get("OMP_NUM_THREADS")
    facts = {"usable_cores": usable, "torch_threads": threads, "OMP_NUM_THREADS": environment}
    text = f"{threads} threads on {usable} usable cores"
    if threads > usable:
        return Finding("threads", "note", text, f"use --threads {usable}, or OMP_NUM_THREADS={usable}", facts)
    return Finding("threads", "ok", text, "", facts)


def _choice() -> Finding:
    """By which break-even densities conversions choose between kernels."""
    from fedpai_kernels import tuning

    found = tuning.state()
    facts: dict[str, Any] = {"kind": found.kind, "path": None if found.path is None else str(found.path)}
    if found.figures is None:
        remedy = "unset FEDPAI_TUNING, or let it name a file that fedpai tune wrote on this machine"
        return Finding("choice", "broken", f"FEDPAI_TUNING: {found.problem}", remedy, facts)
    facts |= {"break_even": found.figures.densities(), "full_fan_in": found.figures.full_fan_in}
    source = (
        f"{found.figures.source}, as FEDPAI_TUNING is off" if found.kind == "off" else found.figures.source
    )
    text = f"break-even densities {source}: {found.figures}"
    if found.kind == "unusable":
        return Finding("choice", "note", f"{text} ({found.problem})", "fedpai tune", facts)
    remedy = "fedpai tune measures those of this machine" if found.kind == "built in" else ""
    return Finding("choice", "ok", text, remedy, facts)


def _openmp() -> Finding:
    import torch

    torch.ones(1 << 16).add_(1.0)  # torch loads its runtime at import; a parallel region makes sure of it
    libraries = openmp_libraries((_PROC / "self" / "maps").read_text())
    facts = {"libraries": libraries}
    if len(libraries) == 1:
        return Finding("openmp", "ok", f"one runtime: {libraries[0]}", "", facts)
    if not libraries:
        return Finding("openmp", "note", "no OpenMP runtime is loaded: one thread only", "", facts)
    text = f"{len(libraries)} runtimes in one process: {', '.join(libraries)}"
    remedy = "thread counts do not reach all of them; do not import the packages that bring the others"
    return Finding("openmp", "note", text, remedy, facts)


def _data() -> Finding:
    from fedpai.data import DataError, load

    local = Path("data")
    try:
        dataset = load("fashion-mnist")
        where = "installed"
    except DataError as error:
        try:
            dataset = load("fashion-mnist", local)
            where = "in ./data (give --data-root data)"
        except DataError:
            return Finding("data", "note", str(error), "make data", {"found": False})
    facts = {
        "found": True,
        "where": where,
        "train": len(dataset.train_labels),
        "test": len(dataset.test_labels),
    }
    text = f"Fashion-MNIST, {facts['train']} + {facts['test']} images, {where}"
    return Finding("data", "ok", text, "", facts)


def _compiler() -> Finding:
    compiler = os.environ.get("CXX", "c++")
    path = shutil.which(compiler)
    if path is None:
        text = f"{compiler} was not found; only building from source needs it"
        return Finding("compiler", "note", text, "on Debian or Ubuntu: apt install g++", {"path": None})
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    version = answer.stdout.partition("\n")[0] or "unknown version"
    return Finding("compiler", "ok", version, "", {"path": path, "version": version})


def openmp_libraries(maps: str) -> list[str]:
    """The OpenMP runtimes in the text of a ``/proc/<pid>/maps``, each once, sorted."""
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if _OPENMP_LIBRARY.search(path))


def _cpu_model() -> str:
    try:
        text = (_PROC / "cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^(?:model name|Model|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


def _cpu_caches() -> dict[str, str]:
    """Data caches of the first core by level, e.g. ``{"L1": "32K", "L2": "512K", "L3": "32768K"}``."""
    caches = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            caches[f"L{level}"] = size
    return caches
