# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench step --profile`: where the time of our training step goes.

The trace is that of torch's profiler: what it notes of an operation costs about a microsecond. How much that is, is
measured: steps with and without it take turns.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedpai.bench import step as bench_step
from fedpai.bench.cases import LayerCase, layers_of_network
from fedpai.bench.errors import BenchError
from fedpai.bench.machine import MachineModel, identity
from fedpai.bench.rows import Row, common
from fedpai.bench.step_rivals import CONTENDERS, Task, Trainer, masked_losses
from fedpai.bench.timing import Call, Effort, quantile
from fedpai.bench.trace import (
    ALLOCATION,
    PARTS,
    STEP,
    Event,
    Key,
    Layer,
    Spent,
    Step,
    take_apart,
)
from fedpai.bench.work import Work, passes_of

REMAINDER = "not traced"
"""What the clock shows and the trace does not."""


@dataclass
class Samples:
    """Steps with and without the trace, in turns.

    Attributes:
        plain: seconds of the steps without.
        traced: seconds of the steps with, by the same clock.
        steps: the latter, taken apart.
    """

    plain: list[float] = field(default_factory=list)
    traced: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def overhead(self) -> float:
        """Median over the turns: by which share the traced step is slower."""
        pairs = zip(self.traced, self.plain, strict=True)
        return _median([traced / plain - 1 for traced, plain in pairs])

    def coverage(self, counted: str = "") -> float:
        """Median over the steps: which share of the clock's time the trace accounts for; "operation" or "gap" for
        that kind of part alone.
        """
        shares = []
        for seconds, step in zip(self.traced, self.steps, strict=True):
            kept = [s.nanoseconds for key, s in step.spent.items() if counted in ("", PARTS[key.part])]
            shares.append(1e-9 * sum(kept) / seconds)
        return _median(shares)


def measure(
    settings: bench_step.Settings, machine: MachineModel, progress: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """Profiles our step of network after network; yields the rows of one after the other, one for each part and one
    for each layer of the parts that have layers.

    Raises:
        BenchError: our first losses differ from those of dense torch under the masks.
    """
    from fedpai.pruning import summary

    start = common("profile", identity(), machine.to_json())
    for model in settings.models:
        for sparsity in settings.sparsities:
            label = f"{model}, {settings.mask} {sparsity:g}"
            progress(f"{label}: masks")
            task, data = bench_step.task_of(
                model, settings.mask, sparsity, settings.batch, settings.mask_data, settings.structure
            )
            progress(f"{label}: reference losses")
            trainer = _checked_trainer(task, label)
            cases = layers_of_network(model, *bench_step.INPUT_SHAPE[:2])
            progress(f"{label}: measuring")
            layers = [Layer(case.name, case.kind) for case in cases]
            samples = sample(trainer.step, layers, settings.effort)
            kept = summary(task.masks, task.network, input_shape=bench_step.INPUT_SHAPE)
            setting = {
                "model": model,
                "mask": settings.mask,
                "structure": settings.structure,
                "density": round(kept.density, 6),
                "batch": settings.batch,
                "sparsity": sparsity,
                "mac_share": round(kept.mac_share, 6),
                "input": list(bench_step.INPUT_SHAPE),
                "mask_data": data,
                "step": _step_facts(samples),
            }
            work = _Works(cases, task.masks, settings.batch, trainer)
            for row in part_rows(samples, work, machine):
                yield {**start, **setting, **row}


def _checked_trainer(task: Task, label: str) -> Trainer:
    trainer = CONTENDERS["ours"](task, False)["sparsify_"]()
    assert isinstance(trainer, Trainer)
    expected = masked_losses(task)
    losses = [float(trainer.step()) for _ in expected.losses]
    if problem := expected.problem(losses, masked=True):
        raise BenchError(f"{label}: not profiled, because it is wrong: {problem}")
    return trainer


# ---- taking samples -------------------------------------------------------------------------------------


def sample(step: Call, layers: Sequence[Layer], effort: Effort) -> Samples:
    """Steps with and without a trace, in turns and in a random order within each.

    Every one of them follows a step that is not measured, as it does in training: what the profiler leaves in the
    caches when it ends is gone by then. Garbage collection rests.
    """
    samples, shuffle = Samples(), random.Random(0).shuffle
    kinds = ["plain", "traced"]
    collecting = gc.isenabled()
    gc.disable()
    try:
        traced(step)  # the first one sets the profiler up
        for done in range(effort.samples):
            if done >= effort.least and sum(samples.traced) > effort.budget:
                break
            shuffle(kinds)
            for kind in kinds:
                step()
                if kind == "plain":
                    begin = time.perf_counter()
                    step()
                    samples.plain.append(time.perf_counter() - begin)
                else:
                    seconds, events = traced(step)
                    samples.traced.append(seconds)
                    samples.steps.append(take_apart(events, layers))
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return samples


def traced(step: Call) -> tuple[float, list[Event]]:
    """Seconds of one step by the clock, and its trace."""
    # torch's profiler says on stderr that it starts and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _allocations_noted(), torch.profiler.profile(activities=cpu, record_shapes=True) as profiler:
        begin = time.perf_counter()
        with torch._C._profiler._RecordFunctionFast(STEP):
            step()
        seconds = time.perf_counter() - begin
    found = profiler.events() or ()
    return seconds, [_event(event) for event in found if not event.is_async]


def _event(event: Any) -> Event:
    shapes = tuple(tuple(s) if s and isinstance(s[0], int) else () for s in event.input_shapes or ())
    times = event.time_range  # microseconds
    return Event(event.name, 1e3 * times.start, 1e3 * times.end, event.thread, event.sequence_nr, shapes)


@contextlib.contextmanager
def _allocations_noted() -> Iterator[None]:
    """Makes an event of each allocation of fedpai_kernels, which torch does not see."""
    from fedpai_kernels import memory

    allocate, note = memory.empty_strided, torch._C._profiler._RecordFunctionFast(ALLOCATION)

    def noted(*arguments: Any, **options: Any) -> Tensor:
        with note:
            return allocate(*arguments, **options)

    memory.empty_strided = noted
    try:
        yield
    finally:
        memory.empty_strided = allocate


# ---- rows -----------------------------------------------------------------------------------------------


class _Works:
    """What the parts have to compute and move at least."""

    def __init__(
        self, cases: Sequence[LayerCase], masks: Mapping[str, Tensor], batch: int, trainer: Trainer
    ) -> None:
        self._cases = {case.name: case for case in cases}
        self._masks, self._batch = masks, batch
        self._parameters = sum(p.numel() for p in trainer.parameters_of.parameters())

    def of(self, key: Key, spent: Spent) -> list[Work]:
        """Of one part of one layer, pass by pass; none where it is not known."""
        case = self._cases.get(key.layer)
        direction = key.part.partition(" ")[2]
        if case is not None and key.layer in self._masks:
            return passes_of(case, self._masks[key.layer], self._batch, direction)
        if key.part == "optimiser":  # value, gradient, momentum; two of them written where they are
            return [Work(0, 0, 12 * self._parameters, 8 * self._parameters)]
        return [Work(0, 0, spent.bytes, spent.written)] if spent.bytes else []


def part_rows(samples: Samples, works: _Works, machine: MachineModel) -> Iterator[Row]:
    """The fields of a row that are about its part: first each part as a whole, with the remainder, then its layers."""
    keys = dict.fromkeys(key for step in samples.steps for key in step.spent)
    clock = _median(samples.traced)
    for part, counted in PARTS.items():
        mine = [key for key in keys if key.part == part]
        if mine:
            known = [works.of(key, _spent(samples, key)) for key in mine]
            yield _row(samples, clock, mine, part, None, counted, known, machine)
    rest = [
        seconds - 1e-9 * step.nanoseconds for seconds, step in zip(samples.traced, samples.steps, strict=True)
    ]
    yield {"part": REMAINDER, "layer": None, "counted": "remainder", **_times(rest, clock)}
    for part, counted in PARTS.items():
        for key in keys:
            if key.part == part and key.layer:
                known = [works.of(key, _spent(samples, key))]
                yield _row(samples, clock, [key], part, key.layer, counted, known, machine)


def _spent(samples: Samples, key: Key) -> Spent:
    """Of the last step that has it; calls and bytes are the same in all."""
    return next(step.spent[key] for step in reversed(samples.steps) if key in step.spent)


def _row(
    samples: Samples,
    clock: float,
    keys: Sequence[Key],
    part: str,
    layer: str | None,
    counted: str,
    works: Sequence[Sequence[Work]],
    machine: MachineModel,
) -> Row:
    nothing = Spent()
    seconds = [1e-9 * sum(step.spent.get(k, nothing).nanoseconds for k in keys) for step in samples.steps]
    row = {"part": part, "layer": layer, "counted": counted, **_times(seconds, clock)}
    row["events"] = sum(_spent(samples, key).events for key in keys)
    if all(works):
        passes = [work for found in works for work in found]
        row["useful_flop"] = sum(work.useful_flop for work in passes)
        row["traffic_bytes"] = sum(work.traffic for work in passes)
        row["bound_ms"] = round(1e3 * machine.bound(*passes).seconds, 6)
    return row


def _times(seconds: Sequence[float], clock: float) -> Row:
    ordered = sorted(seconds)
    median, q20, q80 = (1e3 * quantile(ordered, share) for share in (0.5, 0.2, 0.8))
    return {
        "median_ms": round(median, 6),
        "q20_ms": round(q20, 6),
        "q80_ms": round(q80, 6),
        "share": round(median / 1e3 / clock, 6),
    }


def _step_facts(samples: Samples) -> Row:
    return {
        "traced_ms": round(1e3 * _median(samples.traced), 6),
        "plain_ms": round(1e3 * _median(samples.plain), 6),
        "overhead": round(samples.overhead, 6),
        "coverage": round(samples.coverage(), 6),
        "in_operations": round(samples.coverage("operation"), 6),
        "samples": len(samples.steps),
    }


def _median(values: Sequence[float]) -> float:
    return quantile(sorted(values), 0.5)
