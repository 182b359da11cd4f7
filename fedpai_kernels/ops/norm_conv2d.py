# SPDX-License-Identifier: Apache-2.0
"""Batch norm, activation and sparse convolution as one operation: ``conv2d(relu(batch_norm(x)))``.

The normalised activation is not stored. The convolution normalises what it reads: while it packs a patch, or, where it
walks without packing and on CUDA devices, into memory that is free again when it returns. Only `x` is kept for the
backward pass, which normalises again on the way to the weight's gradient. Both times the arithmetic is that of
:func:`fedpai_kernels.ops.norm.batch_norm`, rounding included: results and gradients have the same bits as the two
operations one after the other.

Rows of an activation moved (reads + writes), one after the other and here, with a walk that packs:

    forward    norm 2 + 1, convolution 1           ->  statistics 1, convolution 1
    backward   convolution 1 + 1 (dx) and 1 (dw)   ->  the same, from x; norm as before, but its dx in place of its dy
    kept       x and the normalised activation     ->  x
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ..layout import to_batch_last
from ..plan import Plan
from .activation import Activation, chosen
from .conv2d import checked_geometry, differentiable_conv2d
from .conv2d_kernels import conv2d_input_grad, has_backward, run_backward, run_forward, run_weight_grad
from .norm import Running, check_norm, stored_for, twin
from .norm_kernels import batch_norm_backward_, batch_norm_statistics, given_statistics
from .registry import LIBRARY, Operation, called_by_position, gradients_of_aliases
from .stored import refuse_graph, stores

__all__ = ["norm_conv2d"]

# stats: (2 or 3, C), mean and 1 / sqrt(var + eps) first.
_NORM = "Tensor x, Tensor stats, Tensor? norm_weight, Tensor? norm_bias, int activation"
LIBRARY.define(
    f"norm_conv2d_forward({_NORM}, Tensor values, Tensor? bias, int plan, int[] geometry,"
    " float slope=0.0) -> Tensor"
)
LIBRARY.define(
    f"norm_conv2d_weight_grad({_NORM}, Tensor dy, int plan, bool with_bias, int[] geometry,"
    " float slope=0.0) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"norm_conv2d_backward({_NORM}, Tensor dy, Tensor values, int plan, bool with_bias, int[] geometry,"
    " float slope=0.0) -> (Tensor, Tensor, Tensor)"
)


class _Norm:
    """The addresses of a norm's parameters, and the tensors behind them."""

    def __init__(
        self, stats: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, slope: float
    ) -> None:
        stats, row_bytes = stats.contiguous(), stats.shape[1] * stats.element_size()
        self._kept = [stats, *(None if t is None else t.contiguous() for t in (weight, bias))]
        parameters = (0 if t is None else t.data_ptr() for t in self._kept[1:])
        (bits,) = struct.unpack("Q", struct.pack("d", slope))
        self.addresses = (stats.data_ptr(), stats.data_ptr() + row_bytes, *parameters, activation, bits)


def _forward(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: int,
    values: Tensor,
    bias: Tensor | None,
    plan: int,
    geometry: list[int],
    slope: float = 0.0,
) -> Tensor:
    norm = _Norm(stats, norm_weight, norm_bias, activation, slope)
    return run_forward(to_batch_last(x), norm.addresses, values, bias, plan, geometry)


def _weight_grad(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: int,
    dy: Tensor,
    plan: int,
    with_bias: bool,
    geometry: list[int],
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    norm = _Norm(stats, norm_weight, norm_bias, activation, slope)
    return run_weight_grad(to_batch_last(x), norm.addresses, dy, plan, with_bias, geometry)


def _backward(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: int,
    dy: Tensor,
    values: Tensor,
    plan: int,
    with_bias: bool,
    geometry: list[int],
    slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = _Norm(stats, norm_weight, norm_bias, activation, slope)
    return run_backward(to_batch_last(x), norm.addresses, dy, values, plan, with_bias, geometry)


LIBRARY.impl("norm_conv2d_forward", _forward, "CPU")
LIBRARY.impl("norm_conv2d_weight_grad", _weight_grad, "CPU")
LIBRARY.impl("norm_conv2d_backward", _backward, "CPU")


@torch.library.register_fake("fedpai::norm_conv2d_forward", lib=LIBRARY)
def _(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: int,
    values: Tensor,
    bias: Tensor | None,
    plan: int,
    geometry: list[int],
    slope: float = 0.0,
) -> Tensor:
    y: Tensor = torch.ops.fedpai.conv2d_forward(x, values, bias, plan, geometry)
    return y


@torch.library.register_fake("fedpai::norm_conv2d_weight_grad", lib=LIBRARY)
def _(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: int,
    dy: Tensor,
    plan: int,
    with_bias: bool,
    geometry: list[int],
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = torch.ops.fedpai.conv2d_weight_grad(x, dy, plan, with_bias, geometry)
    return grads


@torch.library.register_fake("fedpai::norm_conv2d_backward", lib=LIBRARY)
def _(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: int,
    dy: Tensor,
    values: Tensor,
    plan: int,
    with_bias: bool,
    geometry: list[int],
    slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.fedpai.conv2d_backward(x, dy, values, plan, with_bias, geometry)
    return grads


_norm_conv2d_forward = Operation("norm_conv2d_forward", _forward)
_norm_conv2d_weight_grad = Operation("norm_conv2d_weight_grad", _weight_grad)
_norm_conv2d_backward = Operation("norm_conv2d_backward", _backward)


@called_by_position
class _NormConv2d(torch.autograd.Function):
    """(x, norm weight, norm bias, mean | None, var | None, eps, code and slope of the activation, running | None,
    values, bias, plan, geometry, stores) -> (y, stats); given mean and var are constants."""

    @staticmethod
    def forward(
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        code: int,
        slope: float,
        running: Running | None,
        values: Tensor,
        bias: Tensor | None,
        plan: Plan,
        geometry: list[int],
        stores: bool,
    ) -> tuple[Tensor, Tensor]:
        if mean is None or var is None:
            stats = batch_norm_statistics(x, eps)
        else:
            stats = given_statistics(mean, var, eps)
        if running is not None:
            running.update(stats)
        y = _norm_conv2d_forward(
            x, stats, norm_weight, norm_bias, code, values, bias, plan.handle, geometry, slope
        )
        return y, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, norm_weight, norm_bias, mean, _, ctx.eps, ctx.code, ctx.slope, _, values, *rest = inputs
        _, ctx.plan, ctx.geometry, stores = rest
        if stores and any(ctx.needs_input_grad):
            x = stored_for(x, norm_weight, norm_bias, output[1], ctx.code, ctx.slope)
        ctx.save_for_backward(x, norm_weight, norm_bias, output[1], values)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.through_statistics = mean is None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 14
        x, norm_weight, norm_bias, stats, values = ctx.saved_tensors
        norm = (stats, norm_weight, norm_bias, ctx.code)
        needs = ctx.needs_input_grad
        need_x, need_norm = needs[0], needs[1] or needs[2]
        need_values, need_bias = needs[9:11]
        if torch.is_grad_enabled():  # create_graph=True
            refuse_graph(x)
            given = None if ctx.through_statistics else stats

            def function(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, values: Tensor) -> Tensor:
                h = twin(x, norm_weight, norm_bias, given, ctx.eps, ctx.code, ctx.slope)
                return differentiable_conv2d(h, values, None, ctx.plan, ctx.geometry)

            tensors = x, norm_weight, norm_bias, values
            dx, *dnorm_again, dvalues = gradients_of_aliases(function, tensors, (*needs[:3], need_values), dy)
            dbias = dy.sum((0, 2, 3), dtype=values.dtype) if need_bias else None
            return (dx, *dnorm_again, *(None,) * 6, dvalues, dbias, *(None,) * 3)
        dx = dvalues = dbias = None
        dnorm: tuple[Tensor | None, Tensor | None] = (None, None)
        if need_values and (need_x or need_norm) and has_backward(dy):
            dx, dvalues, dbias = _norm_conv2d_backward(
                x, *norm, dy, values, ctx.plan.handle, need_bias, ctx.geometry, ctx.slope
            )
        elif need_values:
            dvalues, dbias = _norm_conv2d_weight_grad(
                x, *norm, dy, ctx.plan.handle, need_bias, ctx.geometry, ctx.slope
            )
        elif need_bias:
            dbias = dy.sum((0, 2, 3), dtype=values.dtype)
        if need_x or need_norm:
            if dx is None:
                dx = conv2d_input_grad(dy, values, ctx.plan.handle, x.shape[2], x.shape[3], ctx.geometry)
            affine = batch_norm_backward_(
                dx, x, norm_weight, norm_bias, stats, ctx.through_statistics, ctx.code, need_x, need_norm, ctx.slope
            )
            if need_norm:
                dnorm = (affine[0] if needs[1] else None, affine[1] if needs[2] else None)
        return (
            dx if need_x else None,
            *dnorm,
            *(None,) * 6,
            dvalues,
            dbias if need_bias else None,
            *(None,) * 3,
        )


def norm_conv2d(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    values: Tensor,
    plan: Plan,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    relu: bool = False,
    activation: Activation | None = None,
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """``sparse_conv2d(batch_norm(x, ..., activation=activation), values, plan, bias, ...)``, with the same bits,
    without the tensor in between.

    The first eight arguments, `relu` and `activation` are those of :func:`fedpai_kernels.ops.norm.batch_norm`, the
    others those of :func:`fedpai_kernels.ops.sparse_conv2d`; `x` is (N, C, H, W) with at least one element.
    Differentiable in x, the norm's weight and bias, values and bias; gradients of gradients go through torch's own
    batch norm. The running statistics are updated in place when `training`. `activation_dtype` is that of both, for
    `x`; the gradient of values then has other bits than from the two, which would round the normalised activation.

    Raises:
        TypeError, ValueError: as those two.
    """
    applied = chosen(relu, activation)
    check_norm(x, running_mean, running_var, norm_weight, norm_bias, training)
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one element, got shape {tuple(x.shape)}")
    geometry = checked_geometry(x, values, plan, bias, stride, padding, dilation, groups)
    if not training:
        mean, var, running = running_mean, running_var, None
    else:
        mean, var, running = None, None, Running(running_mean, running_var, momentum)
    y: Tensor = _NormConv2d.apply(
        x, norm_weight, norm_bias, mean, var, eps, applied.code, applied.slope, running, values, bias, plan, geometry,
        stores(x, activation_dtype),
    )[0]
    return y
