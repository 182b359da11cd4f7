# SPDX-License-Identifier: Apache-2.0
"""Block-sparse 2-D convolution on a GPU: checks, registered ops, autograd.

Three ops, closed under differentiation as those of :mod:`fedpai_kernels.ops.conv2d` are, for masks made of whole
blocks (:mod:`fedpai_kernels.triton.block_plan`). Results are stored as what they are computed from: batch-last, or
channels-last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.conv2d import checked_geometry
from ..ops.conv2d_kernels import layer_sizes
from ..ops.geometry import Pair, unflatten
from ..ops.registry import LIBRARY
from ..plan import Plan, plan_of
from .block_plan import BlockPlan
from .launch import Walked, empty_stored_like, run_walk, run_weight_grad, stored
from .runtime import HALF_OR_SINGLE

PRECISIONS = ("ieee", "tf32", "tf32x3")


class Setting(NamedTuple):
    """What the ops of one layer have in common besides their tensors; travels as four arguments."""

    plan: int  # handle
    block: int
    precision: str
    geometry: list[int]


# ------------------------------------------------------------------------------------------------ registered ops

_SETTING = "int plan, int block, str precision, int[] geometry"
LIBRARY.define(f"block_conv2d_forward(Tensor x, Tensor values, Tensor? bias, {_SETTING}) -> Tensor")
LIBRARY.define(
    f"block_conv2d_input_grad(Tensor dy, Tensor values, SymInt height, SymInt width, {_SETTING}) -> Tensor"
)
LIBRARY.define(
    f"block_conv2d_weight_grad(Tensor x, Tensor dy, bool with_bias, {_SETTING}) -> (Tensor, Tensor)"
)


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, plan: int, block: int, precision: str, geometry: list[int]
) -> Tensor:
    layer, g = plan_of(plan), unflatten(geometry)
    out_channels, _, kernel = layer_sizes(layer)
    shape = (x.shape[0], out_channels, *g.output_size((x.shape[2], x.shape[3]), kernel))
    walked = Walked(g, kernel, input_grad=False)
    return run_walk(x, values, bias, BlockPlan.of(layer, block).forward, block, precision, shape, walked)


def _input_grad(
    dy: Tensor, values: Tensor, height: int, width: int, plan: int, block: int, precision: str, geometry: list[int]
) -> Tensor:
    layer, g = plan_of(plan), unflatten(geometry)
    _, in_channels, kernel = layer_sizes(layer)
    walk = BlockPlan.of(layer, block).input_grad(g.stride, g.dilation)
    walked = Walked(g, kernel, input_grad=True)
    return run_walk(dy, values, None, walk, block, precision, (dy.shape[0], in_channels, height, width), walked)


def _weight_grad(
    x: Tensor, dy: Tensor, with_bias: bool, plan: int, block: int, precision: str, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    layer = plan_of(plan)
    _, _, kernel = layer_sizes(layer)
    blocks = BlockPlan.of(layer, block)
    dvalues = run_weight_grad(x, dy, blocks, layer.nnz, precision, unflatten(geometry), kernel)
    return dvalues, dy.sum((0, 2, 3)) if with_bias else dy.new_empty(0)


# "CPU" serves the interpreter; check_device says so where there is none.
for _device in ("CUDA", "CPU"):
    LIBRARY.impl("block_conv2d_forward", _forward, _device)
    LIBRARY.impl("block_conv2d_input_grad", _input_grad, _device)
    LIBRARY.impl("block_conv2d_weight_grad", _weight_grad, _device)


@torch.library.register_fake("fedpai::block_conv2d_forward", lib=LIBRARY)
def _forward_fake(
    x: Tensor, values: Tensor, bias: Tensor | None, plan: int, block: int, precision: str, geometry: list[int]
) -> Tensor:
    out_channels, _, kernel = layer_sizes(plan_of(plan))
    output = unflatten(geometry).output_size((x.shape[2], x.shape[3]), kernel)
    return empty_stored_like(x, (x.shape[0], out_channels, *output))


@torch.library.register_fake("fedpai::block_conv2d_input_grad", lib=LIBRARY)
def _input_grad_fake(
    dy: Tensor, values: Tensor, height: int, width: int, plan: int, block: int, precision: str, geometry: list[int]
) -> Tensor:
    _, in_channels, _ = layer_sizes(plan_of(plan))
    return empty_stored_like(dy, (dy.shape[0], in_channels, height, width))


@torch.library.register_fake("fedpai::block_conv2d_weight_grad", lib=LIBRARY)
def _weight_grad_fake(
    x: Tensor, dy: Tensor, with_bias: bool, plan: int, block: int, precision: str, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    layer = plan_of(plan)
    return dy.new_empty(layer.nnz), dy.new_empty(layer.mask_shape[0] if with_bias else 0)


# ------------------------------------------------------------------------------------------------------ autograd

_ops: Any = torch.ops.fedpai


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, setting: Setting) -> Tensor:
        return _ops.block_conv2d_forward(x, values, bias, *setting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, _, ctx.plan, ctx.setting = inputs  # the plan, because its handle is weak
        ctx.image = (x.shape[2], x.shape[3])
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        want_x, want_values, want_bias = ctx.needs_input_grad[:3]
        dx = dvalues = dbias = None
        again = torch.is_grad_enabled()  # else nobody will differentiate this pass, and the ops themselves will do
        if want_x and want_values and not again and not torch.compiler.is_compiling():
            dy = stored(dy)  # once for both
        if want_x and again:
            dx = _InputGrad.apply(dy, values, *ctx.image, ctx.plan, ctx.setting)
        elif want_x:
            dx = _ops.block_conv2d_input_grad(dy, values, *ctx.image, *ctx.setting)
        if want_values and again:
            dvalues, dbias = _WeightGrad.apply(x, dy, want_bias, ctx.plan, ctx.setting)
        elif want_values:
            dvalues, dbias = _ops.block_conv2d_weight_grad(x, dy, want_bias, *ctx.setting)
        elif want_bias:
            dbias = dy.sum((0, 2, 3))
        return dx, dvalues, dbias if want_bias else None, None, None


class _InputGrad(torch.autograd.Function):
    """dx(dy, values): linear in each, and its gradients are the other two ops."""

    @staticmethod
    def forward(dy: Tensor, values: Tensor, height: int, width: int, plan: Plan, setting: Setting) -> Tensor:
        return _ops.block_conv2d_input_grad(dy, values, height, width, *setting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, values, _, _, ctx.plan, ctx.setting = inputs
        ctx.save_for_backward(dy, values)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        dy, values = ctx.saved_tensors
        ddy = dvalues = None
        if ctx.needs_input_grad[0]:
            ddy = _Forward.apply(ddx, values, None, ctx.plan, ctx.setting)
        if ctx.needs_input_grad[1]:
            dvalues, _ = _WeightGrad.apply(ddx, dy, False, ctx.plan, ctx.setting)
        return ddy, dvalues, None, None, None, None


class _WeightGrad(torch.autograd.Function):
    """(dvalues, dbias)(x, dy): bilinear, and its gradients are the other two ops."""

    @staticmethod
    def forward(x: Tensor, dy: Tensor, with_bias: bool, plan: Plan, setting: Setting) -> tuple[Tensor, Tensor]:
        return _ops.block_conv2d_weight_grad(x, dy, with_bias, *setting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, dy, ctx.with_bias, ctx.plan, ctx.setting = inputs
        ctx.save_for_backward(x, dy)

    @staticmethod
    def backward(ctx: Any, ddvalues: Tensor, ddbias: Tensor) -> tuple[Tensor | None, ...]:
        x, dy = ctx.saved_tensors
        dx = ddy = None
        if ctx.needs_input_grad[0]:
            dx = _InputGrad.apply(dy, ddvalues, x.shape[2], x.shape[3], ctx.plan, ctx.setting)
        if ctx.needs_input_grad[1]:
            ddy = _Forward.apply(x, ddvalues, ddbias if ctx.with_bias else None, ctx.plan, ctx.setting)
        return dx, ddy, None, None, None


# -------------------------------------------------------------------------------------------------------- public


def block_conv2d(
    x: Tensor,
    values: Tensor,
    plan: Plan,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    block: int | None = None,
    precision: str = "ieee",
) -> Tensor:
    """:func:`fedpai_kernels.ops.sparse_conv2d` for a mask of whole blocks, on a GPU.

    Differentiable in x, values and bias, to any order. Deterministic: the bits depend on shapes and operands alone.
    Sums are float32 for every dtype. A weight outside the mask meets nothing, not even infinities.

    Args:
        x: (N, C, H, W) or (C, H, W), float32, float16 or bfloat16, any strides; batch-last and channels-last are read
            in place, others copied. N may be 0.
        values: (plan.nnz,), the surviving weights in row-major order of the mask.
        plan: of kind "conv2d", of a mask made of whole blocks.
        bias: (out,) or None.
        stride, padding, dilation, groups: as of `sparse_conv2d`.
        block: side of the blocks, 16, 32, 64 or 128; None takes the largest that the mask is made of.
        precision: of products of float32: "ieee" has all 24 bits and no tensor cores; "tf32" rounds the operands to 11
            bits for the tensor cores; "tf32x3" takes three such products for nearly all bits.

    Returns:
        (N, out, H', W'), stored channels-last if x is, else batch-last; or (out, H', W').

    Raises:
        TypeError: a wrong dtype, or operands that are not tensors.
        ValueError: shapes, devices or settings that do not fit, an image smaller than the kernel, or a mask that is not
            made of whole blocks.
        RuntimeError: Triton is not installed.
    """
    if isinstance(x, Tensor) and x.dim() == 3:
        y = block_conv2d(
            x.unsqueeze(0), values, plan, bias, stride, padding, dilation, groups, block=block, precision=precision
        )
        return y.squeeze(0)
    geometry = checked_geometry(x, values, plan, bias, stride, padding, dilation, groups, HALF_OR_SINGLE)
    return differentiable_block_conv2d(x, values, bias, plan, checked_setting(plan, block, precision, geometry))


def checked_setting(plan: Plan, block: int | None, precision: str, geometry: list[int]) -> Setting:
    """Raises ValueError: an unknown precision or block size, or a mask that is not made of such blocks."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    return Setting(plan.handle, BlockPlan.of(plan, block).block, precision, geometry)


def differentiable_block_conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, setting: Setting
) -> Tensor:
    """The registered op with its gradients. Arguments are not checked."""
    y: Tensor = _Forward.apply(x, values, bias, plan, setting)
    return y
