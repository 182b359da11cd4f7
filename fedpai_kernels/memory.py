# SPDX-License-Identifier: Apache-2.0
"""Memory for the outputs of the ops, kept when a tensor is freed and given to the next one.

torch's CPU allocator hands large tensors back to the system as they are freed, and every training step then
pays for the same pages again, one fault at a time; that can cost a third of the step. Here freed memory joins what is
free beside it and waits for the next tensors, whatever their sizes. Live and cached memory together stay within 1.25
times the most that was live in recent steps; training a convolutional network needs 1.0 to 1.1 times.
``FEDPAI_MEMORY_SLACK`` in the environment makes that another factor of at least 1: less on a machine that is short of
memory, more where shapes change all the time. ``FEDPAI_MEMORY_CACHE=0`` leaves the allocation of all tensors to torch.

A tensor in such memory is an ordinary one, with two differences. Its storage cannot grow in place, like that of
`torch.from_numpy`: ``resize_`` to more elements, or a larger result in ``out=``, raises RuntimeError, and torch
leaves the tensor unusable. And torch's profiler does not count its memory. Copies, pickles and shared memory are
torch's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic

from . import _C

__all__ = ["MemoryStats", "empty_cache", "empty_strided", "memory_stats"]

VARIABLE: Final = "FEDPAI_MEMORY_CACHE"
SLACK_VARIABLE: Final = "FEDPAI_MEMORY_SLACK"

# Below this malloc keeps what is freed by itself, and torch is faster.
SMALLEST: Final = 256 * 1024

# What torch.utils.dlpack.from_dlpack comes to for a capsule, after it has asked what it was given.
from_capsule: Final = torch._C._from_dlpack

# DLPack's code and bits. The integers are the positions that max pooling remembers.
_TYPES: Final = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}


def _wanted() -> bool:
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 (off) or 1 (on, the default), got {value!r}")
    return value == "1"


def _slack() -> float:
    text = os.environ.get(SLACK_VARIABLE) or "1.25"
    try:
        slack = float(text)
    except ValueError:
        slack = math.nan
    if not 1 <= slack < math.inf:
        raise ValueError(f"{SLACK_VARIABLE}: expected a number of at least 1 (1.25 is the default), got {text!r}")
    return slack


ENABLED: Final = _wanted()
_C.set_memory_slack(_slack())


class MemoryStats(NamedTuple):
    """What :func:`memory_stats` returns.

    Attributes:
        live_bytes: in tensors that exist, in plans, and in the working memory of kernels.
        cached_bytes: kept for tensors to come.
        peak_live_bytes: the most that `live_bytes` has ever been.
        hits: tensors that cached memory sufficed for, since the start of the process.
        misses: tensors for which the system was asked.
    """

    live_bytes: int
    cached_bytes: int
    peak_live_bytes: int
    hits: int
    misses: int


def memory_stats() -> MemoryStats:
    """The state of the cache of this process: five integers, by name."""
    return MemoryStats(*_C.memory_stats())


def empty_cache() -> None:
    """Give all cached memory back to the system. Tensors that exist keep theirs.

    Worth calling when work of another kind begins in the same process; results never depend on it.
    """
    _C.empty_cache()


def trim_heap() -> None:
    """Give the pages that the C library keeps of freed memory back to the system, where it can (glibc).

    It keeps blocks of up to 32 MB once it has seen such, as dense weights are.
    """
    _C.trim_heap()


def _fills_memory() -> bool:
    # A property of the module, which its types do not know.
    return bool(deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def _is_cpu(device: torch.device | str) -> bool:
    return (device if isinstance(device, torch.device) else torch.device(device)).type == "cpu"


def _left_to_torch() -> bool:
    """Whether something watches or replaces allocations, so that only torch's own will do: fake tensors, tracing
    and other dispatch modes, `torch.func`, or the filling of uninitialised memory.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or (torch.are_deterministic_algorithms_enabled() and _fills_memory())
    )


def empty_strided(
    shape: Sequence[int],
    strides: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Like `torch.empty_strided`, but a CPU tensor of at least 256 KiB takes its memory from the cache.

    Args:
        shape: any number of sizes.
        strides: in elements, one per size, none below 0.
        dtype: the cache serves float32, float64, bfloat16, int32 and int64; torch everything else.
        device: the cache serves the CPU.

    Raises:
        MemoryError: the system has no memory even after the cache was given back.
        ValueError: `strides` do not fit `shape`, or the tensor is larger than an address can count.
    """
    # First what the compiler evaluates as it traces: below that, sizes are numbers.
    if ENABLED and not torch.compiler.is_compiling() and dtype in _TYPES and _is_cpu(device):
        code, bits = _TYPES[dtype]
        size = math.prod(shape) * (bits // 8)
        # Symbolic sizes are no int, and comparing one would fix it.
        if isinstance(size, int) and size >= SMALLEST and not _left_to_torch():
            return from_capsule(_C.empty_strided(shape, strides, code, bits))
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
