# SPDX-License-Identifier: Apache-2.0
"""What layers, steps and merging are measured on: where tensors lie, in which precision, how calls are timed and
caches emptied there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from fedpai.bench.errors import BenchError
from fedpai.bench.machine import last_cache_bytes
from fedpai.bench.rivals.base import CPU, TOLERANCE
from fedpai.bench.timing import Call, Effort, wall_seconds

_COARSE_TOLERANCE = 2e-2  # of results that were rounded to 8 or 11 bits, on the way or at the end


@dataclass(frozen=True)
class Device:
    """
    Attributes:
        place: where tensors lie.
        dtype: of images and of the dense rival's weights; ours are float32.
        tolerance: largest error, as a share of the largest entry, that counts as rounding.
        seconds: of so many calls.
        bytes_to_flush: of a buffer that pushes everything out of the caches when it is written.
        facts: what a row of a device other than the CPU says about it.
    """

    place: torch.device
    dtype: torch.dtype
    tolerance: float
    seconds: Callable[[Call, int], float]
    bytes_to_flush: int
    facts: dict[str, Any]

    def flusher(self) -> Call:
        """A call that leaves nothing of a contender's data in the caches."""
        buffer = torch.zeros(self.bytes_to_flush // 4, device=self.place)
        return lambda: buffer.add_(1.0)

    def effort(self, asked: Effort, cold: bool = False) -> Effort:
        """How long to measure, timed as calls are timed here; cold: the caches are emptied before every sample."""
        return replace(asked, seconds=self.seconds, before_each=self.flusher() if cold else None)

    def start_of(self, row: dict[str, Any]) -> dict[str, Any]:
        """What all rows of a measurement start with, from what they start with on the CPU."""
        if not self.facts:
            return row
        # The machine's bounds are those of its CPU.
        return {**row, "machine_model": {}, "isa": self.facts["isa"], "device": self.facts}

    def check_rivals(self, rivals: Sequence[str]) -> None:
        """Raises a BenchError for a rival that computes elsewhere."""
        elsewhere = [name for name in rivals if name != "dense"]
        if self.facts and elsewhere:
            raise BenchError(f"--rivals: {elsewhere[0]} computes on the CPU; --device cuda has dense, or none")


def cpu() -> Device:
    """Wall-clock time; twice the last cache."""
    return Device(CPU, torch.float32, TOLERANCE, wall_seconds, 2 * last_cache_bytes(), {})


class Event(Protocol):
    """What is asked of `torch.cuda.Event`."""

    def record(self) -> object: ...

    def synchronize(self) -> object: ...

    def elapsed_time(self, end_event: Any) -> float: ...


def event_seconds(new_event: Callable[[], Event]) -> Callable[[Call, int], float]:
    """A timer of calls on the current stream, by two events around them. What was put on the stream before, such as the
    flushing of caches, is not counted; gaps between launches are, where the host is slower than the device.
    """

    def seconds(call: Call, times: int) -> float:
        begin, end = new_event(), new_event()
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def cuda(precision: str = "f32") -> Device:
    """The current CUDA device, timed by events. Sets torch's precision for float32 and lets cuDNN look for its best
    algorithm, for the whole process.

    Args:
        precision: "f32", everything in float32; "tf32", dense torch may round to TF32, which ours has not; "bf16",
            images and dense weights in bfloat16.

    Raises:
        BenchError: torch has no CUDA device, or there are no CUDA kernels.
    """
    import fedpai_kernels

    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else "and no device that it can use"
        raise BenchError(f"--device cuda: there is torch {torch.__version__}, {built}")
    if not fedpai_kernels.cuda.is_available():
        raise BenchError("--device cuda: no CUDA kernels in this installation; docs/gpu.md says how to get them")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    found = torch.cuda.get_device_properties(torch.cuda.current_device())

    def new_event() -> Event:
        event: Event = torch.cuda.Event(enable_timing=True)
        return event

    return described(precision, torch.device("cuda"), event_seconds(new_event), found)


def described(precision: str, place: torch.device, seconds: Callable[[Call, int], float], properties: Any) -> Device:
    """A device with torch's properties of it, and what rows say of it and of the precision on both sides."""
    bf16 = precision == "bf16"
    sides = {
        "ours": {"dtype": "bfloat16" if bf16 else "float32", "values": "float32", "tf32": False},
        "dense": {"dtype": "bfloat16" if bf16 else "float32", "tf32": precision == "tf32", "cudnn_benchmark": True},
    }
    facts = {
        "name": properties.name,
        "isa": f"sm_{properties.major}{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "precision": precision,
        "sides": sides,
    }
    return Device(
        place,
        torch.bfloat16 if bf16 else torch.float32,
        TOLERANCE if precision == "f32" else _COARSE_TOLERANCE,
        seconds,
        2 * properties.L2_cache_size,
        facts,
    )
