# SPDX-License-Identifier: Apache-2.0
"""Pooling modules that keep the batch-last layout. Any other input takes the base class's path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layout import is_batch_last
from ..ops.pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d

__all__ = ["BatchLastAdaptiveAvgPool2d", "BatchLastAvgPool2d", "BatchLastMaxPool2d"]


def _is_ours(x: Tensor) -> bool:
    return (
        x.dim() == 4
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and is_batch_last(x)
    )


class BatchLastMaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`; batch-last in, batch-last out. With `return_indices` the base class does the
    work.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.return_indices or not _is_ours(input):
            return super().forward(input)
        return max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class BatchLastAvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d`; batch-last in, batch-last out."""

    def forward(self, input: Tensor) -> Tensor:
        if not _is_ours(input):
            return super().forward(input)
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class BatchLastAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d`; batch-last in, batch-last out."""

    def forward(self, input: Tensor) -> Tensor:
        if not _is_ours(input):
            return super().forward(input)
        return adaptive_avg_pool2d(input, self.output_size)
