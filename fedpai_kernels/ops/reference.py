# SPDX-License-Identifier: Apache-2.0
"""Dense-masked twins of the sparse ops in plain torch. The only reference: tests and benchmarks import it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import Plan


def conv2d(
    x: Tensor,
    values: Tensor,
    plan: Plan,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with the dense weight that ``values`` stands for; any dtype, differentiable."""
    return torch.nn.functional.conv2d(x, plan.unpack(values), bias, stride, padding, dilation, groups)


def linear(x: Tensor, values: Tensor, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` with the dense weight that ``values`` stands for; any dtype, differentiable."""
    return torch.nn.functional.linear(x, plan.unpack(values), bias)
