# SPDX-License-Identifier: Apache-2.0
"""How much a layer must compute and move at least, exactly: what rates and bounds are made of."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fedpai.bench.cases import LayerCase

# What is timed. "backward" is both gradients in one call, "train" the forward pass and both gradients.
DIRECTIONS = ("forward", "input-grad", "weight-grad", "backward", "train")
_PASSES = {
    "forward": ("forward",),
    "input-grad": ("input-grad",),
    "weight-grad": ("weight-grad",),
    "backward": ("input-grad", "weight-grad"),
    "train": ("forward", "input-grad", "weight-grad"),
}
_FLOAT = 4


@dataclass(frozen=True)
class Work:
    """One pass of one layer for one batch, or several.

    Attributes:
        useful_flop: two for each product of a surviving weight with a pixel inside the image. Products with
            padding are not counted.
        dense_flop: the same if every weight survived.
        bytes: float32 tensors read or written, each once in a pass; channels without a weight are not read.
        written: those of them that are written anew; each cache line is read before that.
        weight_grad_flop: share of `useful_flop` that the weight gradient has.
    """

    useful_flop: int
    dense_flop: int
    bytes: int
    written: int = 0
    weight_grad_flop: int = 0

    @property
    def traffic(self) -> int:
        """Bytes that memory and caches move at least."""
        return self.bytes + self.written


def work_of(case: LayerCase, mask: Tensor, batch: int, direction: str) -> Work:
    """The work of a direction under a mask of the weight's shape, its passes together."""
    passes = passes_of(case, mask, batch, direction)
    return Work(*(sum(getattr(work, f.name) for work in passes) for f in fields(Work)))


def passes_of(case: LayerCase, mask: Tensor, batch: int, direction: str) -> list[Work]:
    """The passes of a direction, each by itself: they run one after the other."""
    rows, columns = (_tap_counts(case, axis) for axis in (0, 1))
    taps = rows[:, None] * columns[None, :]
    surviving = mask.reshape(*mask.shape[:2], *case.kernel).sum((0, 1))
    useful = 2 * int((surviving * taps).sum()) * batch
    dense = 2 * mask.shape[0] * mask.shape[1] * int(taps.sum()) * batch
    moved = _bytes_moved(case, mask, batch)
    return [
        Work(useful, dense, *moved[name], useful if name == "weight-grad" else 0)
        for name in _PASSES[direction]
    ]


def _tap_counts(case: LayerCase, axis: int) -> Tensor:
    """Output positions along an axis at which each tap of the kernel meets the image."""
    return torch.tensor(
        [int(_touched(case, axis, tap).numel()) for tap in range(case.kernel[axis])], dtype=torch.int64
    )


def _touched(case: LayerCase, axis: int, tap: int) -> Tensor:
    """Input positions along an axis that a tap reads."""
    positions = torch.arange(case.output[axis]) * case.stride[axis] - case.padding[axis]
    positions = positions + tap * case.dilation[axis]
    return positions[(positions >= 0) & (positions < case.image[axis])]


def _bytes_moved(case: LayerCase, mask: Tensor, batch: int) -> dict[str, tuple[int, int]]:
    """Read or written, and of that written, by pass."""
    used = mask.reshape(*mask.shape[:2], *case.kernel).any(-1).any(-1)
    outputs = int(used.any(1).sum())
    # A group has input channels of its own, so those of different groups are different channels.
    inputs = int(used.reshape(case.groups, -1, used.shape[1]).any(1).sum())
    touched = [
        torch.cat([_touched(case, axis, tap) for tap in range(case.kernel[axis])]).unique().numel()
        for axis in (0, 1)
    ]
    pixels_in, pixels_out = case.image[0] * case.image[1], case.output[0] * case.output[1]
    x = batch * inputs * touched[0] * touched[1] * _FLOAT
    y = batch * case.out_channels * pixels_out * _FLOAT
    dy = batch * outputs * pixels_out * _FLOAT
    dx = batch * case.in_channels * pixels_in * _FLOAT
    values = int(mask.sum()) * _FLOAT
    return {
        "forward": (x + values + y, y),
        "input-grad": (dy + values + dx, dx),
        "weight-grad": (x + dy + values, values),
    }
