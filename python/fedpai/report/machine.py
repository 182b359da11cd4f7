# SPDX-License-Identifier: Apache-2.0
"""Which machine and which software a number was measured with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch


def identity() -> dict[str, Any]:
    """CPU, cores, threads, instruction set of the kernels, and versions, as plain types."""
    import fedpai
    import fedpai_kernels

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": fedpai_kernels.isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "fedpai-kernels": fedpai.__version__,
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                family = line.partition(":")[2].strip()
                return family
    except OSError:
        pass
    return platform.processor() or platform.machine()
