# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench step`: whole training steps of a network, all contenders taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedpai.bench import masks as bench_masks
from fedpai.bench.device import Device, cpu
from fedpai.bench.errors import BenchError
from fedpai.bench.machine import MachineModel, identity
from fedpai.bench.rows import Result, Row, common, results_of
from fedpai.bench.step_rivals import CHECKED_STEPS, CONTENDERS, Task, Trainer, masked_losses
from fedpai.bench.timing import Effort, interleave

RIVALS = tuple(name for name in CONTENDERS if name != "ours")
INPUT_SHAPE = (3, 32, 32)
CLASSES = 10
SEED = 0


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        models: networks of :mod:`fedpai.models`, by name.
        sparsities: shares of the weights that are removed.
        mask: "uniform", or another kind of :func:`fedpai.bench.masks.network_masks`.
        structure: of the masks; a name of :mod:`fedpai_kernels.structure`.
        batch: images.
        rivals: of :data:`RIVALS`.
        compiled: whether dense torch is tried compiled as well.
        effort: how long to measure.
        mask_data: images for criteria that score with them.
        bf16: whether ours is also tried with saved activations in bfloat16.
        device: what to train on, in float32; rivals other than dense torch compute on the CPU alone.
    """

    models: Sequence[str]
    sparsities: Sequence[float]
    mask: str = "uniform"
    structure: str = "weight"
    batch: int = 64
    rivals: Sequence[str] = RIVALS
    compiled: bool = True
    effort: Effort = field(default_factory=Effort)
    mask_data: str = bench_masks.SCORING_DATA
    bf16: bool = False
    device: Device = field(default_factory=cpu)


def prepare(settings: Settings) -> None:
    """Raises a BenchError for a model, mask or rival that is unknown, or a sparsity that keeps nothing."""
    bench_masks.check_kind(settings.mask)
    for name in settings.rivals:
        if name not in RIVALS:
            raise BenchError(f"--rivals: unknown name {name!r}, expected one of {', '.join(RIVALS)}")
    settings.device.check_rivals(settings.rivals)
    check_networks(settings.models, settings.sparsities)


def check_networks(models: Sequence[str], sparsities: Sequence[float]) -> None:
    """Raises a BenchError for a model that is unknown, or a sparsity that keeps nothing."""
    for name in models:
        with torch.device("meta"):
            network_of(name)
    if max(sparsities) >= 1:
        raise BenchError(f"--sparsity: got {max(sparsities):g}, expected less than 1")


def measure(
    settings: Settings, machine: MachineModel, progress: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """Measures network after network; yields one row for each sparsity.

    Args:
        settings: what.
        machine: recorded in the rows.
        progress: told what is being measured.
    """
    start = settings.device.start_of(common("step", identity(), machine.to_json()))
    for model in settings.models:
        for sparsity in settings.sparsities:
            yield {**start, **_measure(settings, model, sparsity, progress)}


def task_of(
    model: str,
    mask: str,
    sparsity: float,
    batch: int,
    mask_data: str = bench_masks.SCORING_DATA,
    structure: str = "weight",
) -> tuple[Task, str | None]:
    """A network with masked weights and one batch of random images, and the data its masks were scored with."""
    network = network_of(model, seed=SEED)
    masks, data = bench_masks.network_masks(
        network, mask, sparsity, structure=structure, data=mask_data, seed=SEED
    )
    return task_with(network, masks, batch), data


def task_with(network: nn.Module, masks: Mapping[str, Tensor], batch: int) -> Task:
    """The same with masks that there are already; those of the network's weights that they remove become zero."""
    with torch.no_grad():
        for name, found in masks.items():
            weight = network.get_parameter(f"{name}.weight")
            weight.mul_(found)
            weight[found & (weight == 0)] = 1e-3  # a survivor that is zero would be no survivor to some
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn((batch, *INPUT_SHAPE), generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    return Task(network, masks, images, labels)


def network_of(name: str, seed: int | None = None) -> nn.Module:
    """A network of :mod:`fedpai.models` for the images of the measurement."""
    from fedpai import models

    try:
        return models.create(
            name, num_classes=CLASSES, in_channels=INPUT_SHAPE[0], image_size=INPUT_SHAPE[1], seed=seed
        )
    except ValueError as error:
        raise BenchError(f"--model: {error}") from error


def setting_of(settings: Settings, model: str, sparsity: float, task: Task, data: str | None) -> Row:
    """The fields of a row that say what was trained."""
    from fedpai.pruning import summary
    from fedpai_kernels.tuning import break_evens

    figures = break_evens()
    kept = summary(task.masks, task.network, input_shape=INPUT_SHAPE)
    return {
        "model": model,
        "mask": settings.mask,
        "structure": settings.structure,
        "density": round(kept.density, 6),
        "batch": settings.batch,
        "sparsity": sparsity,
        "mac_share": round(kept.mac_share, 6),
        "input": list(INPUT_SHAPE),
        "mask_data": data,
        "break_evens": f"{figures.source}: {figures}",
    }


def _measure(settings: Settings, model: str, sparsity: float, progress: Callable[[str], None]) -> Row:
    label = f"{model}, {settings.mask} {sparsity:g}"
    progress(f"{label}: masks")
    task, data = task_of(
        model, settings.mask, sparsity, settings.batch, settings.mask_data, settings.structure
    )
    setting = setting_of(settings, model, sparsity, task, data)
    task = replace(task.to(settings.device.place), bf16=settings.bf16)
    progress(f"{label}: reference losses")
    expected = masked_losses(task)

    trainers: dict[tuple[str, str], Trainer] = {}
    losses: dict[str, list[float]] = {"dense-masked": expected.losses}
    reasons: dict[str, list[tuple[str, str]]] = {}
    layers: dict[str, int] = {}
    starts: dict[str, dict[str, Row]] = {}
    for name in ("ours", *settings.rivals):
        for variant, build in CONTENDERS[name](task, settings.compiled).items():
            progress(f"{label}: preparing {name} {variant}")
            trainer = build()
            if isinstance(trainer, str):
                reasons.setdefault(name, []).append(("unavailable", f"{variant}: {trainer}"))
                continue
            found, failure, first_ms = _first_losses(trainer)
            losses[f"{name}, {variant}"] = found
            problem = failure or expected.problem(found, trainer.masked, trainer.exact)
            if problem:
                reasons.setdefault(name, []).append(("wrong", f"{variant}: {problem}"))
                continue
            trainers[name, variant] = trainer
            starts.setdefault(name, {})[variant] = _start(trainer, first_ms)
            layers = trainer.layers or layers
    progress(f"{label}: measuring")
    calls = {key: trainer.step for key, trainer in trainers.items()}
    timings = interleave(calls, settings.device.effort(settings.effort), lambda key: key[0])
    results = {
        name: _result(
            {v: t for (n, v), t in timings.items() if n == name}, starts.get(name, {}), reasons.get(name, [])
        )
        for name in ("ours", *settings.rivals)
    }
    return {
        **setting,
        "losses": {name: [round(value, 7) for value in found] for name, found in losses.items()},
        "layers": layers,
        **results_of(results),
    }


def _first_losses(trainer: Trainer) -> tuple[list[float], str, float]:
    """Losses of the first steps, what went wrong if they could not be made, and milliseconds of the first one."""
    try:
        start = time.perf_counter()
        losses = [float(trainer.step())]
        first_ms = 1e3 * (time.perf_counter() - start)
        return losses + [float(trainer.step()) for _ in range(CHECKED_STEPS - 1)], "", first_ms
    except Exception as error:  # compilers and foreign packages fail in every way there is
        text = str(error).strip() or type(error).__name__
        return [], f"failed: {text.splitlines()[0][:200]}", 0.0


def _start(trainer: Trainer, first_ms: float) -> Row:
    """What a contender took before it was warm."""
    start: Row = {"first_step_ms": round(first_ms, 3)}
    return start if trainer.convert_ms is None else {**start, "convert_ms": round(trainer.convert_ms, 3)}


def _result(
    timings: Mapping[str, Any], starts: Mapping[str, Row], reasons: Sequence[tuple[str, str]]
) -> Result:
    status = "wrong" if any(state == "wrong" for state, _ in reasons) else "unavailable"
    return Result(timings, starts, status, "; ".join(text for _, text in reasons))
