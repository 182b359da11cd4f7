# SPDX-License-Identifier: Apache-2.0
"""Whether the kernels can run where a tensor is. Nothing here imports Triton before it is needed."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..ops.operands import Backend


def check_device(x: Tensor) -> None:
    """Raises unless Triton is installed and compiles for the device of `x`, or interprets on the CPU.

    Raises:
        RuntimeError: Triton is not installed.
        ValueError: a device without kernels.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "fedpai_kernels.triton: its kernels are compiled by Triton, which is not installed; "
            "`pip install 'fedpai-kernels[triton]'` installs it. fedpai_kernels.ops needs nothing on a CPU"
        )
    from .kernels.table import INTERPRETED

    if INTERPRETED and x.device.type != "cpu":
        raise ValueError(
            f"x: got a tensor on {x.device}, but TRITON_INTERPRET is set, under which kernels run on the CPU only: "
            "expected a CPU tensor"
        )
    if not INTERPRETED and x.device.type != "cuda":
        raise ValueError(
            f"x: expected a CUDA tensor, got one on {x.device}. Triton's interpreter runs these kernels on the CPU, "
            "slowly, for tests: set TRITON_INTERPRET=1 in the environment before Python starts. For speed on a CPU use "
            "fedpai_kernels.ops"
        )


def _dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return torch.float32, torch.float16, torch.bfloat16


HALF_OR_SINGLE = Backend(_dtypes, check_device)
"""What the kernels take: sums are float32 whatever the operands are."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device current while kernels are launched: Triton asks for the current one, and its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
