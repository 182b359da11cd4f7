# SPDX-License-Identifier: Apache-2.0
"""Measures the figures of this machine: forward and both gradients of single layers, by the sparse kernel and by the
dense one among the batch-last layers of a sparse network (as in lab/004_break_even).
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import to_batch_last
from ..memory import empty_cache
from ..nn.conv2d import BatchLastConv2d, MaskedConv2d, SparseConv2d
from ..nn.linear import MaskedLinear, SparseLinear
from .figures import BreakEvens
from .file import TuningError, default_path, write
from .store import OFF, VARIABLE

__all__ = ["crossing", "interleaved_medians", "steps_of", "threshold", "tune"]

Step = Callable[[], None]
Progress = Callable[[float, str], None]

SECONDS = 40.0
LEAST_ROUNDS, MOST_ROUNDS = 2, 11


@dataclass(frozen=True)
class _Conv:
    """A convolution of `batch` images, square in everything."""

    batch: int
    inputs: int
    outputs: int
    image: int
    kernel: int = 3
    stride: int = 1

    def module(self) -> nn.Conv2d:
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, self.kernel // 2, bias=False)

    def operands(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.inputs, self.image, self.image, requires_grad=self.inputs > 3)
        size = (self.image - 1) // self.stride + 1
        return x, torch.randn(self.batch, self.outputs, size, size)

    def __str__(self) -> str:
        stride = "" if self.stride == 1 else f"/{self.stride}"
        return f"{self.inputs}-{self.outputs} {self.kernel}x{self.kernel}{stride} @{self.image}, batch {self.batch}"


@dataclass(frozen=True)
class _Linear:
    """A linear layer."""

    batch: int
    inputs: int
    outputs: int

    def module(self) -> nn.Linear:
        return nn.Linear(self.inputs, self.outputs)

    def operands(self) -> tuple[Tensor, Tensor]:
        return torch.randn(self.batch, self.inputs, requires_grad=True), torch.randn(self.batch, self.outputs)

    def __str__(self) -> str:
        return f"{self.inputs}-{self.outputs} linear, batch {self.batch}"


# What stands for each kind, and the densities between which its break-even is interpolated.
_CONV_DENSITIES = (0.2, 0.5, 0.7, 0.85, 1.0)
_LINEAR_DENSITIES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_MASKED: dict[str, tuple[tuple[_Conv | _Linear, ...], tuple[float, ...]]] = {
    "conv2d": ((_Conv(16, 64, 64, 32), _Conv(32, 128, 128, 16), _Conv(32, 512, 512, 4)), _CONV_DENSITIES),
    "strided": ((_Conv(16, 64, 128, 32, 3, 2), _Conv(32, 256, 512, 8, 3, 2)), _CONV_DENSITIES),
    "pointwise": ((_Conv(32, 128, 128, 16, 1), _Conv(32, 256, 64, 8, 1)), _CONV_DENSITIES),
    "linear": ((_Linear(64, 512, 512), _Linear(64, 784, 300), _Linear(256, 3072, 768)), _LINEAR_DENSITIES),
    "blocks": ((_Conv(32, 64, 64, 32), _Conv(32, 256, 256, 8)), _CONV_DENSITIES),
    "linear_blocks": ((_Linear(64, 512, 512), _Linear(256, 3072, 768)), _LINEAR_DENSITIES),
}
_BLOCK = (16, 4)  # output and input channels, where masks keep blocks
_FULL = (
    _Conv(32, 3, 64, 32), _Conv(32, 16, 32, 16), _Conv(32, 32, 32, 16), _Conv(32, 64, 64, 16), _Conv(32, 128, 128, 8),
)  # fmt: skip


def tune(
    path: str | os.PathLike[str] | None = None,
    *,
    seconds: float = SECONDS,
    progress: Progress = lambda share, text: None,
) -> BreakEvens:
    """Measures which kernel is faster where, on this machine with torch's present number of threads, and keeps it.

    `sparsify_` then chooses by these figures wherever processor, instruction set, number of threads and versions are
    the same. Let nothing else run meanwhile.

    Args:
        path: the file to write; by default that which FEDPAI_TUNING names, else
            :func:`fedpai_kernels.tuning.default_path`.
        seconds: how long to measure, about.
        progress: called with the share that is done and what comes next.

    Returns:
        The figures.

    Raises:
        TuningError: FEDPAI_TUNING is ``off``, so that nothing would read the default file.
        ValueError: `seconds` is not positive.
        OSError: the file cannot be written.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected more than 0, got {seconds!r}")
    target = _target(path)
    cases = [*((name, case) for name, (found, _) in _MASKED.items() for case in found)]
    share = seconds / (len(cases) + 0.5 * len(_FULL))
    ratios: dict[str, list[Mapping[float, float]]] = {name: [] for name in _MASKED}
    full: dict[int, float] = {}
    samples: dict[str, Any] = {}
    done = 0.0
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for name, case in cases:
            progress(done / seconds, str(case))
            found = _masked_ratios(case, _MASKED[name][1], share, _BLOCK if name.endswith("blocks") else (1, 1))
            ratios[name].append(found)
            samples[f"{name}, {case}"] = {f"{density:g}": round(ratio, 3) for density, ratio in found.items()}
            done += share
        for conv in _FULL:
            progress(done / seconds, f"{conv}, no mask")
            ratio = _full_ratio(conv, share / 2)
            full[conv.inputs * conv.kernel**2] = ratio
            samples[f"{conv}, no mask"] = round(ratio, 3)
            done += share / 2
    empty_cache()
    progress(1.0, "")
    figures = BreakEvens(
        **{name: crossing(_mean(found)) for name, found in ratios.items()},
        full_fan_in=threshold(full),
        source="measured on this machine",
    )
    write(target, figures, samples)
    return figures


def _target(path: str | os.PathLike[str] | None) -> Path:
    if path is not None:
        return Path(path)
    setting = os.environ.get(VARIABLE, "")
    if setting == OFF:
        raise TuningError(
            f"{VARIABLE} is {OFF!r}, so nothing would read the figures; unset it, or name a file to write"
        )
    return Path(setting) if setting else default_path()


# ---- the contenders -------------------------------------------------------------------------------------


def steps_of(module: nn.Conv2d | nn.Linear, mask: Tensor, x: Tensor, dy: Tensor) -> dict[str, Step]:
    """Forward and backward of one layer, as it would be in a sparse network: by the "sparse" and the "dense" kernel.

    Args:
        module: the dense layer.
        mask: bool, of its weight's shape.
        x: its input; whether its gradient is computed is what ``x.requires_grad`` says.
        dy: the gradient of its output.
    """
    if isinstance(module, nn.Linear):
        return {
            "sparse": _step(SparseLinear.from_dense(module, mask), x, dy),
            "dense": _step(MaskedLinear.from_dense(module, mask), x, dy),
        }
    x, dy = to_batch_last(x.detach()).requires_grad_(x.requires_grad), to_batch_last(dy)
    masked = MaskedConv2d.from_dense(module, mask)
    masked.batch_last = True
    return {"sparse": _step(SparseConv2d.from_dense(module, mask), x, dy), "dense": _step(masked, x, dy)}


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(dy)

    return run


def _masked_ratios(
    case: _Conv | _Linear, densities: Sequence[float], seconds: float, block: tuple[int, int]
) -> dict[float, float]:
    """Time of the dense kernel over that of the sparse one, by density, for masks of such blocks."""
    module, (x, dy) = case.module(), case.operands()
    runs: dict[str, Step] = {}
    for density in densities:
        # rand is below 1; the last weight stays, so that no mask is empty.
        mask = torch.rand_like(module.weight[:: block[0], :: block[1]]) < density
        mask.view(-1)[-1] = True
        mask = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        mask = mask[: module.weight.shape[0], : module.weight.shape[1]]
        steps = steps_of(module, mask, x, dy)
        runs[f"{density:g}"] = steps["sparse"]
        runs["dense"] = steps[
            "dense"
        ]  # of the last: unpacking takes longer where more is kept, and there it is close
    medians = interleaved_medians(runs, seconds)
    return {density: medians["dense"] / medians[f"{density:g}"] for density in densities}


def _full_ratio(case: _Conv, seconds: float) -> float:
    """The same for a convolution without a mask."""
    x, dy = case.operands()
    x, dy = to_batch_last(x.detach()).requires_grad_(x.requires_grad), to_batch_last(dy)
    runs = {}
    for name, fan_in in (("sparse", case.inputs * case.kernel**2), ("dense", 0)):
        module = case.module()
        module.__class__ = BatchLastConv2d
        assert isinstance(module, BatchLastConv2d)
        module.full_fan_in = fan_in
        runs[name] = _step(module, x, dy)
    medians = interleaved_medians(runs, seconds)
    return medians["dense"] / medians["sparse"]


def interleaved_medians(runs: Mapping[str, Step], seconds: float) -> dict[str, float]:
    """Median seconds of each, taking turns in a new order each round, until the time is up.

    One round comes first, unmeasured: it builds what is built on first use.
    """
    start = time.perf_counter()
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for name in order:
                begin = time.perf_counter()
                runs[name]()
                samples[name].append(time.perf_counter() - begin)
    finally:
        if collecting:
            gc.enable()
    return {name: sorted(found)[(len(found) - 1) // 2] for name, found in samples.items()}


# ---- from ratios to figures -----------------------------------------------------------------------------


def _mean(ratios: Sequence[Mapping[float, float]]) -> dict[float, float]:
    """Geometric mean over the layers of a kind, by density."""
    return {
        density: math.exp(sum(math.log(found[density]) for found in ratios) / len(ratios))
        for density in ratios[0]
    }


def crossing(ratios: Mapping[float, float]) -> float:
    """The density up to which the sparse kernel wins: where dense time over sparse time falls below one.

    Between two densities the logarithm of the ratio is taken for linear. It is searched from the densest: noise
    among low densities, where much is won, decides nothing. 0 if the sparse kernel never wins.
    """
    above: tuple[float, float] | None = None
    for density in sorted(ratios, reverse=True):
        gain = math.log(ratios[density])
        if gain >= 0:
            if above is None:
                return density
            return density + (above[0] - density) * gain / (gain - above[1])
        above = density, gain
    return 0.0


def threshold(ratios: Mapping[int, float]) -> int:
    """The fan-in up to which the sparse kernel is to be taken, by its ratios: that which loses least in all.

    Between two that were measured it is their geometric mean; beyond the largest nothing is claimed.
    """
    sizes = sorted(ratios)
    # Lost by taking the sparse kernel for the first `count` alone.
    losses = [
        sum(max(0.0, -math.log(ratios[size])) for size in sizes[:count])
        + sum(max(0.0, math.log(ratios[size])) for size in sizes[count:])
        for count in range(len(sizes) + 1)
    ]
    count = losses.index(min(losses))
    if count == 0:
        return 0
    return sizes[-1] if count == len(sizes) else round(math.sqrt(sizes[count - 1] * sizes[count]))
