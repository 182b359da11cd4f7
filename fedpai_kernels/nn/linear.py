# SPDX-License-Identifier: Apache-2.0
"""Linear layers: with a sparse kernel, and with a dense kernel and a masked weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.linear import sparse_linear
from ..plan import Plan
from .masks import plan_for
from .packed import PackedWeight, is_dispatched, match_autocast

__all__ = ["MaskedLinear", "SparseLinear"]


class _PackedLinear(PackedWeight):
    dense_type = nn.Linear

    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | Plan,
    ) -> None:
        """As `torch.nn.Linear`, with a mask of the weight's shape or a plan."""
        dense = nn.Linear(in_features, out_features, bias, device, dtype)
        plan = plan_for(dense, mask)
        super().__init__()
        self.__dict__.update(dense.__dict__)
        self.retype(self, plan)

    def extra_repr(self) -> str:
        text = nn.Linear.extra_repr(self)  # type: ignore[arg-type]
        return f"{text}, nnz={self.plan.nnz}, density={self.plan.density:.4g}"


class SparseLinear(_PackedLinear):
    """`torch.nn.Linear` that computes with the surviving weights only. float32 and float64 on the CPU; on a CUDA device
    as :class:`SparseConv2d`.

    Attributes:
        activation_dtype: as in :class:`SparseConv2d`.
    """

    activation_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        x = match_autocast(input, self.values)
        return sparse_linear(x, self.values, self.plan, self.bias, activation_dtype=self.activation_dtype)


class MaskedLinear(_PackedLinear):
    """`torch.nn.Linear` by the dense kernel, for layers that would lose by the sparse one on the CPU.

    The parameter is packed as in :class:`SparseLinear`; weights outside of the mask are zero and stay so. On a CUDA
    device as :class:`MaskedConv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_dispatched(input, self.values):
            return sparse_linear(match_autocast(input, self.values), self.values, self.plan, self.bias)
        return F.linear(input, self.weight, self.bias)
