# SPDX-License-Identifier: Apache-2.0
"""On which machine and with which software a row was measured, and what that machine can do at best."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedpai.bench.work import Work
from fedpai_kernels.tuning import cpu_model

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PACKAGES = {"fedpai_kernels": "fedpai-kernels", "numpy": "numpy", "sparseprop": "sparseprop"}


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


def cache_bytes() -> dict[str, int]:
    """The sizes of :func:`caches`, as far as they are known."""
    return {
        level: int(match[1]) * 1024
        for level, size in caches().items()
        if (match := re.fullmatch(r"(\d+)K", size))
    }


def last_cache_bytes() -> int:
    """Size of the largest data cache, or 64 MiB where it is unknown."""
    return max(cache_bytes().values(), default=64 << 20)


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
class Bound:
    """The least time that some work takes, in seconds: the larger of two floors, pass by pass.

    Attributes:
        loads: multiply-adds at the rate at which the first-level cache delivers their operands.
        memory: compulsory traffic at the rate of a stream.
        seconds: the larger one, summed over the passes.
    """

    loads: float
    memory: float
    seconds: float

    @property
    def by(self) -> str:
        """Which of the two is larger: "loads" or "memory"."""
        return "loads" if self.loads >= self.memory else "memory"

    def to_json(self) -> dict[str, Any]:
        """Both floors in milliseconds."""
        return {
            "loads_ms": round(1e3 * self.loads, 6),
            "memory_ms": round(1e3 * self.memory, 6),
            "by": self.by,
        }


@dataclass(frozen=True)
class MachineModel:
    """What the machine can do at best, measured with the threads and the instruction set in use.

    Attributes:
        fma_gflops: float32 multiply-adds between registers.
        load_gflops: (bytes, GFLOP/s): multiply-adds that each load one operand from a buffer of so many bytes
            per thread, ascending by bytes. The first one lies in the first-level cache.
        loads_per_fma: loads per multiply-add of the kernels, forward and input gradient; weight gradient.
        stream: (bytes, GB/s): scaling one buffer into another that hold so many bytes together, counting the
            source read, and the destination read and written; ascending by bytes.
    """

    fma_gflops: float
    load_gflops: tuple[tuple[int, float], ...]
    loads_per_fma: tuple[float, float]
    stream: tuple[tuple[int, float], ...]

    @property
    def load_bound_gflops(self) -> float:
        """Rate of a convolution whose operands are in the first-level cache."""
        return self.load_gflops[0][1] / self.loads_per_fma[0]

    def stream_at(self, size: int) -> float:
        """GB/s for a working set of so many bytes: that of the nearest probe that is no larger."""
        sizes = [probe for probe, _ in self.stream]
        return self.stream[max(0, bisect_left(sizes, size + 1) - 1)][1]

    def bound(self, *passes: Work) -> Bound:
        """Both floors of some work, whose passes run one after the other."""
        loads, memory = [self._loads(work) for work in passes], [self._memory(work) for work in passes]
        return Bound(sum(loads), sum(memory), sum(map(max, loads, memory)))

    def _loads(self, work: Work) -> float:
        forward, weight_grad = self.loads_per_fma
        loads = forward * (work.useful_flop - work.weight_grad_flop) + weight_grad * work.weight_grad_flop
        return loads / (self.load_gflops[0][1] * 1e9)

    def _memory(self, work: Work) -> float:
        return work.traffic / (self.stream_at(work.bytes) * 1e9)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "fma_gflops": round(self.fma_gflops, 1),
            "load_gflops": {str(size): round(rate, 1) for size, rate in self.load_gflops},
            "loads_per_fma": [round(loads, 4) for loads in self.loads_per_fma],
            "stream_gbs": {str(size): round(rate, 1) for size, rate in self.stream},
        }

    def __str__(self) -> str:
        loads = ", ".join(f"{rate:.0f} from {_size(size)}" for size, rate in self.load_gflops)
        streams = ", ".join(f"{rate:.0f} in {_size(size)}" for size, rate in self.stream)
        return (
            f"multiply-adds: {self.fma_gflops:.0f} GFLOP/s from registers; with a load each {loads}\n"
            f"stream, GB/s: {streams}"
        )


_STREAM_BYTES = (1 << 19, 1 << 21, 1 << 23, 1 << 25, 1 << 27)


def measure_machine(seconds: float = 1.0) -> MachineModel:
    """Probes the machine for about so long; the best of many short repeats, as disturbances only slow down."""
    import fedpai_kernels
    from fedpai_kernels import _C

    threads, share = torch.get_num_threads(), seconds / 10
    sizes = _load_bytes(threads)
    registers = 2e-9 * _C.fma_rate(0, threads, share)
    loads = [2e-9 * _C.fma_rate(size, threads, share) for size in sizes]
    streams = [1e-9 * _C.stream_rate(size, threads, share) for size in _STREAM_BYTES]
    fedpai_kernels.empty_cache()
    # A smaller working set is never slower to reach: what says so was disturbed.
    return MachineModel(
        max(registers, *loads),
        tuple(zip(sizes, _falling(loads), strict=True)),
        _C.loads_per_fma(),
        tuple(zip(_STREAM_BYTES, _falling(streams), strict=True)),
    )


def _load_bytes(threads: int) -> tuple[int, ...]:
    """Per thread: half of the first- and of the second-level cache, and half of a thread's share of the third."""
    found = cache_bytes()
    first, second, third = (
        found.get(level, usual) for level, usual in (("L1", 32 << 10), ("L2", 512 << 10), ("L3", 16 << 20))
    )
    return first // 2, max(second // 2, first), max(third // threads // 2, second)


def _falling(rates: Sequence[float]) -> list[float]:
    """Each at least as high as those after it."""
    return [max(rates[i:]) for i in range(len(rates))]


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
