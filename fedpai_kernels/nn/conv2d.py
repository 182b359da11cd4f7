# SPDX-License-Identifier: Apache-2.0
"""Convolutions: with a sparse kernel, with a dense kernel and a masked weight, and plain ones between
them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layout import is_batch_last, to_batch_last, to_contiguous
from ..ops.conv2d import sparse_conv2d
from ..ops.geometry import resolve_geometry
from ..plan import Plan
from ..tuning import BUILT_IN
from .choice import walks_in_full
from .deferred import PendingNorm
from .masks import plan_for
from .packed import PackedWeight, is_dispatched, match_autocast

__all__ = ["BatchLastConv2d", "MaskedConv2d", "SparseConv2d"]

Pair = tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _PackedConv2d(PackedWeight):
    dense_type = nn.Conv2d

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: str | Pair
    dilation: Pair
    transposed: bool
    output_padding: Pair
    groups: int
    padding_mode: PaddingMode
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: str | int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | Plan,
    ) -> None:
        """As `torch.nn.Conv2d`, with a mask of the weight's shape or a plan."""
        dense = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        plan = plan_for(dense, mask)
        super().__init__()
        self.__dict__.update(dense.__dict__)
        self.retype(self, plan)

    def _padded(self, x: Tensor) -> tuple[Tensor, str | Pair]:
        """`x` with the padding that is not of zeros, and the padding that is left to the convolution."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)

    def extra_repr(self) -> str:
        text = nn.Conv2d.extra_repr(self)  # type: ignore[arg-type]
        return f"{text}, nnz={self.plan.nnz}, density={self.plan.density:.4g}"


class SparseConv2d(_PackedConv2d):
    """`torch.nn.Conv2d` that computes with the surviving weights only.

    Any input layout; hands on batch-last (:mod:`fedpai_kernels.layout`). float32 and float64 on the CPU. On a CUDA
    device float32 weights, float32 or bfloat16 images, and whichever kernels are fastest
    (:mod:`fedpai_kernels.dispatch`).

    Attributes:
        activation_dtype: `torch.bfloat16` keeps the input for the backward pass rounded
            (:mod:`fedpai_kernels.ops.stored`); None, the default, as it is.
    """

    activation_dtype: torch.dtype | None = None
    reads_pending_norms = True

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is PendingNorm:
            if self.padding_mode == "zeros":
                settings = (self.stride, self.padding, self.dilation, self.groups)
                y = input.convolved((self.values, self.plan, self.bias, *settings), self.activation_dtype)
                if y is not None:
                    return y
            input = input.computed()
        x, padding = self._padded(match_autocast(input, self.values))
        return sparse_conv2d(
            x, self.values, self.plan, self.bias, self.stride, padding, self.dilation, self.groups,
            activation_dtype=self.activation_dtype,
        )  # fmt: skip


class MaskedConv2d(_PackedConv2d):
    """`torch.nn.Conv2d` by the dense kernel, for layers that would lose by the sparse one on the CPU.

    The parameter is packed as in :class:`SparseConv2d`; weights outside of the mask are zero and stay so. On a CUDA
    device it computes as that does, with the dense kernel among the choices; other dtypes than that takes are dense.

    Attributes:
        batch_last: whether to hand on batch-last, as the layers of a sparse model do. Default False.
    """

    batch_last = False

    def forward(self, input: Tensor) -> Tensor:
        if is_dispatched(input, self.values):
            x, padding = self._padded(match_autocast(input, self.values))
            settings = self.stride, padding, self.dilation, self.groups
            return sparse_conv2d(x, self.values, self.plan, self.bias, *settings)
        x, padding = self._padded(_for_dense(input))
        y = F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return _handed_on(y) if self.batch_last else y


class BatchLastConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` without a mask, among batch-last layers: takes any layout, hands on batch-last.

    With few weights per output channel it computes by the sparse kernel, as if by a mask that keeps everything
    (:func:`fedpai_kernels.nn.choice.walks_in_full`).

    Attributes:
        full_fan_in: how many these are at most; `sparsify_` sets it where it was measured on this machine.
        activation_dtype: of the input that the sparse kernel keeps, as in :class:`SparseConv2d`.
    """

    full_fan_in = BUILT_IN.full_fan_in
    activation_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self._is_ours(input):
            plan = _full_plan(tuple(self.weight.shape), self.groups)
            return sparse_conv2d(
                input, self.weight.reshape(-1), plan, self.bias, *self._geometry(), self.groups,
                activation_dtype=self.activation_dtype,
            )  # fmt: skip
        return _handed_on(super().forward(_for_dense(input)))

    def _is_ours(self, x: Tensor) -> bool:
        if type(x) is not Tensor or x.dim() != 4 or x.device.type != "cpu" or x.numel() == 0:
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != self.weight.dtype:
            return False
        if self.padding_mode != "zeros" or x.shape[1] != self.in_channels:  # torch says what is wrong
            return False
        kernel = (self.kernel_size[0], self.kernel_size[1])
        if not walks_in_full(self.in_channels, self.groups, kernel, self.full_fan_in):
            return False
        geometry = resolve_geometry(kernel, *self._geometry())
        return min(geometry.output_size((x.shape[2], x.shape[3]), kernel)) > 0

    def _geometry(self) -> tuple[Any, Any, Any]:
        return self.stride, self.padding, self.dilation


@lru_cache(maxsize=256)
def _full_plan(shape: tuple[int, ...], groups: int) -> Plan:
    return Plan.from_mask(torch.ones(shape, dtype=torch.bool), groups=groups)


def _for_dense(x: Tensor) -> Tensor:
    """Dense kernels copy batch-last inputs themselves, but slower."""
    return to_contiguous(x) if x.dim() == 4 and is_batch_last(x) else x


def _handed_on(y: Tensor) -> Tensor:
    return to_batch_last(y) if y.dim() == 4 and y.device.type == "cpu" else y
