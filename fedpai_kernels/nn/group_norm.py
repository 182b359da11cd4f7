# SPDX-License-Identifier: Apache-2.0
"""GroupNorm that keeps the batch-last layout; and InstanceNorm2d, which is a group norm with as many groups as
channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layout import is_batch_last
from ..ops.group_norm import group_norm

__all__ = ["BatchLastGroupNorm", "BatchLastInstanceNorm2d"]

# (num_groups, weight, bias, eps), as `group_norm` takes them after x.
Settings = tuple[int, Tensor | None, Tensor | None, float]


def _is_ours(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    if x.dim() != 4 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if x.numel() == 0 or not is_batch_last(x):
        return False
    return all(t is None or t.dtype == x.dtype for t in (weight, bias))


class BatchLastGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`; a batch-last input (N, C, H, W) on the CPU is normalised in place of layout.

    Parameters and state dict are the base class's. Any other input (rank, layout, device, half precision) takes the
    base class's path.

    Attributes:
        activation_dtype: as in :class:`fedpai_kernels.nn.norm.BatchLastBatchNorm2d`.
    """

    activation_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:  # the base class's name
        if not self._is_ours(input):
            return super().forward(input)
        return group_norm(input, *self._settings(), activation_dtype=self.activation_dtype)

    def _settings(self) -> Settings:
        return self.num_groups, self.weight, self.bias, self.eps

    def _is_ours(self, x: Tensor) -> bool:
        return _is_ours(x, self.weight, self.bias)


class BatchLastInstanceNorm2d(nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`; a batch-last input (N, C, H, W) on the CPU is normalised in place of layout.

    Parameters and state dict are the base class's, which also does the work for any other input, and where there are
    running statistics.

    Attributes:
        activation_dtype: as in :class:`BatchLastGroupNorm`.
    """

    activation_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        # One value per image and channel, or another number of channels: the base class says what is wrong.
        sizes_fit = input.dim() == 4 and input.shape[1] == self.num_features and input.shape[2:].numel() > 1
        if self.running_mean is not None or not sizes_fit or not _is_ours(input, self.weight, self.bias):
            return super().forward(input)
        settings = self.num_features, self.weight, self.bias, self.eps
        return group_norm(input, *settings, activation_dtype=self.activation_dtype)
