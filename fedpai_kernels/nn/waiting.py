# SPDX-License-Identifier: Apache-2.0
"""Norms that were called but not computed, and how they are computed with what came after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import is_batch_last
from ..ops.activation import NONE, RELU, Activation
from ..ops.group_norm import group_norm
from ..ops.norm import batch_norm
from ..ops.norm_conv2d import norm_conv2d
from ..plan import Plan
from .group_norm import Settings as GroupSettings
from .norm import Settings
from .sites import Surroundings

__all__ = ["CHANGED", "Convolution", "WaitingBatchNorm", "WaitingGroupNorm", "WaitingNorm", "version"]

# values, plan, bias, stride, padding, dilation, groups, as `sparse_conv2d` takes them after x.
Pair = tuple[int, int]
Convolution = tuple[Tensor, Plan, "Tensor | None", Pair, "Pair | str", Pair, int]

CHANGED = (
    "what a norm reads, or what is added to it, was changed in place before what comes after it was computed; "
    "convert the model with fuse=False"
)


def version(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version


class WaitingNorm:
    """A norm that was called but not computed.

    Attributes:
        x: its input.
        parameters: weight and bias.
        called_in: the surroundings.
    """

    def __init__(
        self,
        x: Tensor,
        parameters: tuple[Tensor | None, Tensor | None],
        statistics: tuple[Tensor | None, ...],
        called_in: Surroundings,
        activation_dtype: torch.dtype | None,
    ) -> None:
        """`statistics`: those that are normalised with, where they are not those of `x`."""
        self.x, self.parameters, self.called_in, self.activation_dtype = x, parameters, called_in, activation_dtype
        self._read = (x, *parameters, *statistics)
        self._versions = [version(t) for t in self._read]

    def compute(self, residual: Tensor | None, activation: Activation) -> Tensor:
        """activation(norm(x) [+ residual])."""
        raise AssertionError

    def takes(self, residual: Any) -> bool:
        """Whether :meth:`compute` can add that."""
        return False

    def convolve(self, activation: Activation, convolution: Convolution) -> Tensor:
        """conv2d(activation(norm(x))), without the tensor in between."""
        raise AssertionError

    def _check_unchanged(self) -> None:
        if [version(t) for t in self._read] != self._versions:
            raise RuntimeError(CHANGED)


class WaitingGroupNorm(WaitingNorm):
    """Of which the result may be cut by a ReLU."""

    def __init__(
        self, x: Tensor, settings: GroupSettings, called_in: Surroundings, activation_dtype: torch.dtype | None
    ) -> None:
        super().__init__(x, settings[1:3], (), called_in, activation_dtype)
        self._settings = settings

    def compute(self, residual: Tensor | None, activation: Activation) -> Tensor:
        self._check_unchanged()
        assert residual is None
        return group_norm(
            self.x, *self._settings, relu=activation == RELU, activation_dtype=self.activation_dtype
        )


class WaitingBatchNorm(WaitingNorm):
    """`uncounted`: where it is, by the id of its module, until it has taken the batch into the running statistics."""

    def __init__(
        self,
        x: Tensor,
        settings: Settings,
        called_in: Surroundings,
        uncounted: dict[int, WaitingBatchNorm],
        module_id: int,
        activation_dtype: torch.dtype | None,
    ) -> None:
        statistics = () if settings[4] else settings[:2]
        super().__init__(x, settings[2:4], statistics, called_in, activation_dtype)
        self._settings, self._uncounted, self._module_id = settings, uncounted, module_id
        self._counted = False

    def updates_statistics(self) -> bool:
        mean, var, _, _, training, *_ = self._settings
        return training and (mean is not None or var is not None)

    def count(self) -> None:
        """Takes the batch into the running statistics, unless that has happened."""
        if not self._counted:
            with torch.no_grad():
                self.compute(None, NONE)

    def compute(self, residual: Tensor | None, activation: Activation) -> Tensor:
        settings = self._statistics_once()
        self._check_unchanged()
        return batch_norm(
            self.x, *settings, activation=activation, residual=residual, activation_dtype=self.activation_dtype
        )

    def _statistics_once(self) -> Settings:
        """The settings; the running statistics, which take the batch in, the first time only."""
        settings = self._settings
        if settings[4] and self._counted:
            settings = (None, None, *settings[2:])
        self._counted = True
        if self._uncounted.get(self._module_id) is self:
            del self._uncounted[self._module_id]
        return settings

    def convolve(self, activation: Activation, convolution: Convolution) -> Tensor:
        mean, var, weight, bias, training, momentum, eps = self._statistics_once()
        self._check_unchanged()
        return norm_conv2d(
            self.x, mean, var, weight, bias, training, momentum, eps, *convolution, activation=activation,
            activation_dtype=self.activation_dtype,
        )  # fmt: skip

    def takes(self, residual: Any) -> bool:
        x = self.x
        return (
            type(residual) is Tensor
            and residual.shape == x.shape
            and residual.dtype == x.dtype
            and residual.device == x.device
            and is_batch_last(residual)
        )
