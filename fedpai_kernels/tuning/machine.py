# SPDX-License-Identifier: Apache-2.0
"""What a measurement depends on: processor, instruction set, threads and versions."""

from __future__ import annotations

import platform
import re
from functools import lru_cache
from pathlib import Path

import torch

from .. import _C

__all__ = ["cpu_model", "facts"]

_CPUINFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)  # the kernel writes that file anew for every reader, core by core
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


def facts() -> dict[str, str | int]:
    """All of it, with the instruction set and the number of threads now in use."""
    return {
        "cpu": cpu_model(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "kernels": _C.__version__,
    }
