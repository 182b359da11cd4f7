# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench step --memory`: the peak of resident memory while a network trains, each contender in a process of
its own.

A row's ``peaks`` hold, for each contender and variant, ``peak_bytes`` (the growth over ``start_bytes``, what the
process had before the network was made), for ours also ``cached_bytes`` and, unless tiny, ``peak_live_bytes``
of :func:`fedpai_kernels.memory_stats`, and with dense torch measured ``of_dense``: the share of its peak in contiguous
tensors.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fedpai.bench import step as bench_step
from fedpai.bench.errors import BenchError
from fedpai.bench.machine import MachineModel, identity
from fedpai.bench.memory_child import TRAINERS
from fedpai.bench.rows import Row, common
from fedpai.bench.step_rivals import BF16, masked_losses

STEPS = 5
"""Enough for gradients, optimiser state and the cache of freed blocks to be there."""

PLAIN = ("dense", "contiguous, eager")

# The path first: it is the parent's, whatever the folder in which the child starts.
_CODE = (
    "import sys; sys.path[:] = sys.argv[2:]; from fedpai.bench.memory_child import main; main(sys.argv[1])"
)


def measure(
    settings: bench_step.Settings, machine: MachineModel, progress: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """Trains network after network; yields one row for each sparsity.

    Raises:
        BenchError: a contender's process fails, or its first losses are not those of the masked network.
    """
    start = common("memory", identity(), machine.to_json())
    for model in settings.models:
        for sparsity in settings.sparsities:
            yield {**start, **_measure(settings, model, sparsity, progress)}


def _measure(
    settings: bench_step.Settings, model: str, sparsity: float, progress: Callable[[str], None]
) -> Row:
    label = f"{model}, {settings.mask} {sparsity:g}"
    progress(f"{label}: masks")
    task, data = bench_step.task_of(
        model, settings.mask, sparsity, settings.batch, settings.mask_data, settings.structure
    )
    setting = bench_step.setting_of(settings, model, sparsity, task, data)
    progress(f"{label}: reference losses")
    expected = masked_losses(task)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        masks = Path(folder) / "masks.pt"
        torch.save(dict(task.masks), masks)
        job = {
            "model": model,
            "batch": settings.batch,
            "masks": str(masks),
            "steps": STEPS,
            "threads": torch.get_num_threads(),
        }
        for name, variant in TRAINERS:
            if name != "ours" and name not in settings.rivals:
                continue
            if variant == BF16 and not settings.bf16:
                continue
            progress(f"{label}: {name} {variant}")
            numbers = run_child({**job, "contender": name, "variant": variant}, label)
            losses = numbers.pop("losses")[: len(expected.losses)]
            if problem := expected.problem(losses, masked=name == "ours", exact=variant != BF16):
                raise BenchError(f"{label}: {name}, {variant}: not counted, because it is wrong: {problem}")
            found[name, variant] = numbers
    peaks: dict[str, dict[str, Any]] = {}
    for (name, variant), numbers in found.items():
        if PLAIN in found:
            numbers["of_dense"] = round(numbers["peak_bytes"] / found[PLAIN]["peak_bytes"], 6)
        peaks.setdefault(name, {})[variant] = numbers
    methods = dict.fromkeys(numbers.pop("method") for numbers in found.values())
    return {
        **setting,
        "steps": STEPS,
        "method": "; ".join(methods),
        "peaks": peaks,
    }


def run_child(job: dict[str, Any], label: str) -> dict[str, Any]:
    """The figures of one contender, from a new process.

    Raises:
        BenchError: it ended without figures, or they show no growth; the contender is named.
    """
    who = f"{label}: {job['contender']}, {job['variant']}"
    done = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(job), *sys.path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"{who}: {_reason(done)}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["peak_bytes"] <= 0:
        raise BenchError(f"{who}: the peak is not above the start, as {found['method']} tells it")
    return found


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return f"its process failed: {said[-1][:200] if said else f'exit code {done.returncode}'}"
