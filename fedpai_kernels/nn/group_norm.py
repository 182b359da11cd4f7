# SPDX-License-Identifier: Apache-2.0
"""GroupNorm that keeps the batch-last layout, alone and with the ReLU that follows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layout import is_batch_last
from ..ops.group_norm import group_norm

__all__ = ["BatchLastGroupNorm", "BatchLastGroupNormReLU"]


class BatchLastGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`; a batch-last input (N, C, H, W) on the CPU is normalised in place of layout.

    Parameters and state dict are the base class's. Any other input (rank, layout, device, half precision) takes the
    base class's path.
    """

    _relu = False

    def forward(self, input: Tensor) -> Tensor:  # the base class's name
        if not self._is_ours(input):
            y = super().forward(input)
            return torch.relu(y) if self._relu else y
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, relu=self._relu)

    def _is_ours(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
            return False
        if x.numel() == 0 or not is_batch_last(x):
            return False
        return all(t is None or t.dtype == x.dtype for t in (self.weight, self.bias))


class BatchLastGroupNormReLU(BatchLastGroupNorm):
    """Group norm and the ReLU after it in one pass. The state dict is that of the group norm."""

    _relu = True
