# SPDX-License-Identifier: Apache-2.0
"""How much a layer must compute and move at least, exactly: what rates and bounds are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpai.bench.cases import LayerCase

# What is timed. "backward" is both gradients in one call, "train" the forward pass and both gradients.
DIRECTIONS = ("forward", "input-grad", "weight-grad", "backward", "train")
_PASSES = {"forward": 1, "input-grad": 1, "weight-grad": 1, "backward": 2, "train": 3}
_FLOAT = 4


@dataclass(frozen=True)
class Work:
    """One direction of one layer for one batch.

    Attributes:
        useful_flop: two for each product of a surviving weight with a pixel inside the image. Products with
            padding are not counted.
        dense_flop: the same if every weight survived.
        bytes: float32 tensors read or written, each once; channels without a weight are not read.
    """

    useful_flop: int
    dense_flop: int
    bytes: int


def work_of(case: LayerCase, mask: Tensor, batch: int, direction: str) -> Work:
    """The work of a direction under a mask of the weight's shape."""
    rows, columns = (_tap_counts(case, axis) for axis in (0, 1))
    taps = rows[:, None] * columns[None, :]
    surviving = mask.reshape(*mask.shape[:2], *case.kernel).sum((0, 1))
    useful = int((surviving * taps).sum()) * batch
    dense = mask.shape[0] * mask.shape[1] * int(taps.sum()) * batch

    passes = _PASSES[direction]
    moved = _bytes_moved(case, mask, batch)
    return Work(2 * passes * useful, 2 * passes * dense, moved[direction])


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


def _bytes_moved(case: LayerCase, mask: Tensor, batch: int) -> dict[str, int]:
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
    moved = {
        "forward": x + values + y,
        "input-grad": dy + values + dx,
        "weight-grad": x + dy + values,
        "backward": x + dy + dx + 2 * values,
    }
    return {**moved, "train": moved["forward"] + moved["backward"]}
