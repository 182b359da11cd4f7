# SPDX-License-Identifier: Apache-2.0
"""BatchNorm2d that keeps the batch-last layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import cuda
from ..layout import is_batch_last
from ..ops.norm import batch_norm
from ..ops.norm_kernels import DTYPES, parameter_dtype

__all__ = ["BatchLastBatchNorm2d"]

# (running_mean, running_var, weight, bias, training, momentum, eps), as `batch_norm` takes them after x.
Settings = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, float]


class BatchLastBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`; a batch-last input is normalised in place of layout.

    Parameters, buffers, state dict and every setting (momentum None, no affine, no running statistics) are
    the base class's. Any other input takes the base class's path: another layout or dtype, a device without kernels,
    and a CUDA device where these cannot be loaded.

    Attributes:
        activation_dtype: `torch.bfloat16` keeps the input for the backward pass rounded
            (:mod:`fedpai_kernels.ops.stored`); None, the default, as it is.
    """

    activation_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:  # the base class's name
        self._check_input_dim(input)
        if not self._is_ours(input):
            return super().forward(input)
        return batch_norm(input, *self._settings(), activation_dtype=self.activation_dtype)

    def _settings(self) -> Settings:
        """What to normalise with now; counts the batch."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        weight, bias, mean, var = self._tensors()
        from_batch = self.training or (mean is None and var is None)
        if self.training and not self.track_running_stats:
            mean = var = None
        return mean, var, weight, bias, from_batch, momentum, self.eps

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, running mean and variance."""
        parameters, buffers = self._parameters, self._buffers
        try:  # where `self.weight` finds them last, after a search and a call, twice in each layer of each step
            return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
        except KeyError:  # parametrised
            return self.weight, self.bias, self.running_mean, self.running_var

    def _is_ours(self, x: Tensor) -> bool:
        if x.dtype not in DTYPES.get(x.device.type, ()) or x.numel() == 0 or not is_batch_last(x):
            return False
        if x.is_cuda and (self.activation_dtype is not None or not cuda.is_available()):
            return False
        dtype, device = parameter_dtype(x), x.device
        return all(t is None or (t.dtype is dtype and t.device == device) for t in self._tensors())
