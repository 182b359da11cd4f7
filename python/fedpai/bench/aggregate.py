# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench aggregate`: merging what clients send, packed, against a loop over dense state_dicts.

Two forms: "shared", the weighted mean under one mask for all, and "personal", the masked mean under masks that the
clients draw independently, with the density that `--mask` gives each layer (so they overlap as little as masks can).

The rival is the loop that federated averaging usually is, tensor by tensor in float32, in two variants: "multiply", the
formula as one writes it, and "in place", with torch's fused multiply-and-add into one sum. It sums as many clients, but
has only `distinct` state_dicts in memory, which take turns; that can only help its caches. Clients' packed vectors are
all distinct.

A row has ``copy``: copying all clients' values into one buffer, by as many threads, timed in the same rounds; and
``copy_share``: the bytes that ours must move (``bytes``: values and positions read, the result written, with personal
masks the old model read) per second of ours, over the bytes that the fastest copy reads and writes per second.

On a CUDA device all of it is there: ours are the functions of :mod:`fedpai_kernels.cuda`, the loops run over CUDA
tensors and the copy is torch's, from the device to itself. Rows then have ``device``, as written in ``device.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedpai.bench import masks as bench_masks
from fedpai.bench.aggregate_rivals import SEED, Task, all_values, copies, ours, state_dicts
from fedpai.bench.device import Device, cpu
from fedpai.bench.errors import BenchError
from fedpai.bench.machine import MachineModel, identity
from fedpai.bench.rows import CACHES, Result, Row, common, results_of
from fedpai.bench.step import check_networks, network_of
from fedpai.bench.timing import Call, Effort, Timing, interleave
from fedpai.federation.layout import Layout, MaskSet, pack

FORMS = ("shared", "personal")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        models: networks of :mod:`fedpai.models`, by name.
        sparsities: shares of the weights that are removed.
        mask: "uniform", or another criterion or allocation of :func:`fedpai.pruning.criteria`.
        mask_data: images for criteria that score with them.
        forms: of :data:`FORMS`.
        clients: how many are merged.
        distinct: state_dicts of the rival that exist.
        cold: empty the caches before every sample.
        effort: how long to measure.
        device: where everything lies and is merged, in float32.
    """

    models: Sequence[str]
    sparsities: Sequence[float]
    mask: str = "uniform"
    mask_data: str = bench_masks.SCORING_DATA
    forms: Sequence[str] = FORMS
    clients: int = 100
    distinct: int = 10
    cold: bool = False
    effort: Effort = field(default_factory=Effort)
    device: Device = field(default_factory=cpu)


def prepare(settings: Settings) -> None:
    """Raises a BenchError for a model, mask or form that is unknown, or a sparsity that keeps nothing."""
    bench_masks.check_kind(settings.mask)
    for name in settings.forms:
        if name not in FORMS:
            raise BenchError(f"--form: unknown name {name!r}, expected one of {', '.join(FORMS)}")
    check_networks(settings.models, settings.sparsities)


def measure(
    settings: Settings, machine: MachineModel, progress: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """Measures network after network; yields one row for each sparsity and form.

    Args:
        settings: what.
        machine: recorded in the rows.
        progress: told what is being measured.
    """
    start = settings.device.start_of(common("aggregate", identity(), machine.to_json()))
    for model in settings.models:
        for sparsity in settings.sparsities:
            progress(f"{model}, {settings.mask} {sparsity:g}: masks")
            network = network_of(model, seed=SEED)
            found, data = bench_masks.network_masks(
                network, settings.mask, sparsity, data=settings.mask_data, seed=SEED
            )
            base = MaskSet.from_masks(Layout.of(network), found)
            for form in settings.forms:
                progress(f"{model}, {settings.mask} {sparsity:g}: {form}")
                setting = {"model": model, "sparsity": sparsity, "mask": settings.mask, "mask_data": data}
                yield {**start, **setting, "batch": None, **_measure(settings, base, form)}


def _measure(settings: Settings, base: MaskSet, form: str) -> Row:
    clients, distinct = settings.clients, min(settings.distinct, settings.clients)
    device, task = settings.device, Task.make(base, form, clients)
    problems = _problems(task, distinct, device)
    plain, compensated = ours(task, clients, device)
    calls: dict[tuple[str, str], Call] = {("ours", "float64"): plain, ("compensated", "float64"): compensated}
    dense = state_dicts(task, clients, distinct, device.place)
    calls |= {("state_dict", name): call for name, call in dense.items() if name not in problems}
    values = all_values(task, clients, device.place)
    copied = copies(values, torch.empty_like(values), None if device.facts else torch.get_num_threads())
    calls |= {("copy", name): call for name, call in copied.items()}
    timings = interleave(calls, device.effort(settings.effort, settings.cold), lambda key: key[0])
    of = {
        contender: {name: timing for (whose, name), timing in timings.items() if whose == contender}
        for contender in ("ours", "compensated", "state_dict", "copy")
    }
    reason = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    results = {
        "ours": Result(of["ours"], {}),
        "compensated": Result(of["compensated"], {}),
        "state_dict": Result(of["state_dict"], {}, "wrong", reason),
    }
    moved = 4 * (values.numel() + task.old.size)
    if task.personal:
        moved += 4 * (values.numel() + task.old.size)
    return {
        "form": form,
        "density": round(base.density, 6),
        "clients": clients,
        "distinct": distinct,
        "caches": CACHES[settings.cold],
        "values": values.numel(),
        "union": task.whole.kept,
        "bytes": moved,
        "copy": {"bytes": 8 * values.numel(), **{name: timing.to_json() for name, timing in of["copy"].items()}},
        "copy_share": round(_rate(moved, of["ours"]) / _rate(8 * values.numel(), of["copy"]), 4),
        **results_of(results),
    }


def _rate(moved: int, timings: Mapping[str, Timing]) -> float:
    return moved / min(timing.median for timing in timings.values())


def _problems(task: Task, distinct: int, device: Device) -> dict[str, str]:
    """Which of the rival's variants do not merge the first `distinct` clients as ours does."""
    found: Any = ours(task, distinct, device)[0]()
    merged = torch.as_tensor(found).cpu().numpy()
    problems = {}
    for name, call in state_dicts(task, distinct, distinct, device.place).items():
        mean: Any = call()
        state = {key: tensor.cpu() for key, tensor in mean.items()}
        state |= {slot.key: torch.zeros(slot.shape, dtype=torch.int64) for slot in task.layout.ints}
        theirs = pack(task.layout.gather(state)[0], task.whole, task.layout)
        error = float(np.abs(theirs - merged).max(initial=0))
        if not error < 1e-4:
            problems[name] = f"differs from ours by up to {error:.1e}"
    return problems
