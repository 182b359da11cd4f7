# SPDX-License-Identifier: Apache-2.0
"""What runs in the processes of `fedpai bench step --memory`: one contender trains, and its peak is read.

Everything is imported and has computed something tiny before the count begins, so that the libraries themselves are
in nobody's figure.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fedpai_kernels
from fedpai.bench import masks as bench_masks
from fedpai.bench import step as bench_step
from fedpai.bench.step_rivals import BF16, FORMATS, Task, Trainer, dense_trainer, our_trainer

RESET, NOT_RESET, MAXRSS = "VmHWM", "VmHWM, not reset", "ru_maxrss"
"""How the peak is read: the best way, that without the right to reset it, and that of systems other than Linux."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_WARM_UP = "wrn10x1"

TRAINERS: dict[tuple[str, str], Callable[[Task], Trainer]] = {
    ("ours", "sparsify_"): lambda task: our_trainer(task, task.network),
    ("ours", BF16): lambda task: our_trainer(task, task.network, bf16=True),
    ("ours", "sparsify_, fuse=False"): lambda task: our_trainer(task, task.network, fuse=False),
    **{
        ("dense", f"{name}, eager"): lambda task, name=name: dense_trainer(task, task.network, name)  # type: ignore[misc]
        for name in FORMATS
    },
}
"""By contender and variant; each changes the task's network and copies nothing."""


def main(text: str) -> None:
    """Does the job that the JSON text describes, and prints its figures as JSON in the last line."""
    print(json.dumps(figures(json.loads(text))))


def figures(job: dict[str, Any]) -> dict[str, Any]:
    """Trains a network and reads the peak.

    Args:
        job: contender and variant, "threads", "masks" (a file), "model", "batch" and "steps".

    Returns:
        `method`, `start_bytes` (resident before the network was made), `peak_bytes` (by how much the peak is above
        that), `losses`, and for ours `cached_bytes` and `peak_live_bytes` of :func:`fedpai_kernels.memory_stats`, the
        latter where the network needed more than the warm-up.
    """
    torch.set_num_threads(job["threads"])
    masks = torch.load(job["masks"], weights_only=True)  # held to the end: in nobody's figure
    _in_passing(_warm_up)
    before = fedpai_kernels.memory_stats()
    method, start = begin()
    losses = _train(job, masks)
    found = {"method": method, "start_bytes": start, "peak_bytes": peak(method) - start, "losses": losses}
    if job["contender"] == "ours":
        stats = fedpai_kernels.memory_stats()
        found["cached_bytes"] = stats.cached_bytes
        if stats.peak_live_bytes > before.peak_live_bytes:
            found["peak_live_bytes"] = stats.peak_live_bytes
    return found


def _train(job: dict[str, Any], masks: dict[str, torch.Tensor]) -> list[float]:
    network = bench_step.network_of(job["model"], seed=bench_step.SEED)
    task = bench_step.task_with(network, masks, job["batch"])
    trainer = TRAINERS[job["contender"], job["variant"]](task)
    return [float(trainer.step()) for _ in range(job["steps"])]


def _warm_up() -> None:
    """A step of every contender: what is imported, started or compiled on first use is there afterwards."""
    for build in TRAINERS.values():
        network = bench_step.network_of(_WARM_UP, seed=bench_step.SEED)
        masks, _ = bench_masks.network_masks(network, "uniform", 0.9)
        build(bench_step.task_with(network, masks, 2)).step()


def _in_passing(work: Callable[[], None]) -> None:
    """On a thread that ends: the working memory that kernels keep for each thread goes with it."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


# ---- resident memory ------------------------------------------------------------------------------------


def begin() -> tuple[str, int]:
    """Gives freed memory back and starts a new peak. Returns how it is read, and the resident bytes now."""
    gc.collect()
    fedpai_kernels.empty_cache()
    _trim()
    method = RESET
    try:
        _CLEAR.write_text("5")
    except OSError:
        method = NOT_RESET
    try:
        return method, _status("VmRSS")
    except (OSError, KeyError):
        return MAXRSS, peak(MAXRSS)


def peak(method: str) -> int:
    """The most bytes that were resident, since :func:`begin` or, where that cannot be told, ever."""
    if method != MAXRSS:
        return _status("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def _trim() -> None:
    """glibc keeps freed memory; what it kept would be in the start and hide as much of the growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
