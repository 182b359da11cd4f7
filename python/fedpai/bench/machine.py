# SPDX-License-Identifier: Apache-2.0
"""On which machine and with which software a row was measured, and what that machine can do at best."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedpai.bench.work import Work

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PACKAGES = {"fedpai_kernels": "fedpai-kernels", "numpy": "numpy", "sparseprop": "sparseprop"}

# A sparse kernel loads one vector for each multiply-add. Share of the register-only rate that leaves: two loads
# and two multiply-adds per cycle in the L1 cache with 32-byte vectors; with 64-byte vectors 100 of 176 GFLOP/s were
# measured on an Ice Lake server core.
_LOAD_SHARE = {"avx512": 0.57}


def identity() -> dict[str, Any]:
    """Machine, software, threads and instruction set, as plain types, for a row."""
    import fedpai_kernels

    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "caches": caches(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "software": {"python": platform.python_version(), "torch": torch.__version__, **_versions()},
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "isa": fedpai_kernels.isa(),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """Name, with family and model number where the kernel tells: virtual machines shorten the name."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text.partition("\n\n")[0], re.MULTILINE))
    name = fields.get("model name") or fields.get("CPU part") or platform.machine()
    if "cpu family" in fields and "model" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name


def caches() -> dict[str, str]:
    """Data caches of the first core by level, e.g. ``{"L1": "32K", "L2": "512K", "L3": "32768K"}``."""
    found = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def last_cache_bytes() -> int:
    """Size of the largest data cache, or 64 MiB where it is unknown."""
    sizes = [int(match[1]) * 1024 for size in caches().values() if (match := re.fullmatch(r"(\d+)K", size))]
    return max(sizes, default=64 << 20)


def commit() -> str | None:
    """Commit of the source tree this package runs from, with "+" if it was changed; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
        tracked = _git(here, "ls-files", Path(__file__).name)
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "") if tracked else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


# ---- machine model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MachineModel:
    """What the machine can do at best, measured by small probes with the threads in use.

    Attributes:
        fma_gflops: of a float32 matrix product of torch's, which works from registers.
        load_share: share of it with one vector load from L1 per multiply-add.
        bandwidth: (bytes, GB/s): copying between two buffers that hold so many bytes together, read and
            write counted; ascending by bytes.
    """

    fma_gflops: float
    load_share: float
    bandwidth: tuple[tuple[int, float], ...]

    @property
    def load_bound_gflops(self) -> float:
        """Rate of multiply-adds with one load each."""
        return self.fma_gflops * self.load_share

    def bandwidth_at(self, moved: int) -> float:
        """GB/s for a working set of so many bytes: that of the nearest probe that is no larger."""
        sizes = [size for size, _ in self.bandwidth]
        return self.bandwidth[max(0, bisect_left(sizes, moved + 1) - 1)][1]

    def bound(self, work: Work) -> float:
        """Seconds that the work takes at least: the slower of arithmetic and memory.

        A kernel that shares loads between multiply-adds may pass the arithmetic bound.
        """
        arithmetic = work.useful_flop / (self.load_bound_gflops * 1e9)
        return max(arithmetic, work.bytes / (self.bandwidth_at(work.bytes) * 1e9))

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "fma_gflops": round(self.fma_gflops, 1),
            "load_share": self.load_share,
            "bandwidth_gbs": {str(size): round(rate, 1) for size, rate in self.bandwidth},
        }

    def __str__(self) -> str:
        rates = ", ".join(f"{rate:.0f} GB/s at {_size(size)}" for size, rate in self.bandwidth)
        return (
            f"multiply-adds {self.fma_gflops:.0f} GFLOP/s from registers, {self.load_bound_gflops:.0f} with a load "
            f"each; copy {rates}"
        )


def measure_machine(seconds: float = 1.0) -> MachineModel:
    """Probes the machine for about so long; the best of many short calls, as disturbances only slow down."""
    import fedpai_kernels

    side, sizes = 768, (1 << 19, 1 << 21, 1 << 23, 1 << 25, 1 << 27)
    share = seconds / (2 * len(sizes))
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    product = _best(lambda: torch.mm(a, b, out=out), seconds / 2)
    rates = []
    for size in sizes:
        source, target = torch.zeros(size // 8), torch.zeros(size // 8)
        rates.append((size, size / _best(partial(target.copy_, source), share) / 1e9))
    return MachineModel(2 * side**3 / product / 1e9, _LOAD_SHARE.get(fedpai_kernels.isa(), 1.0), tuple(rates))


def _best(call: Callable[[], object], seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
