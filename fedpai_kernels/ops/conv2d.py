# SPDX-License-Identifier: Apache-2.0
"""Sparse-weight 2-D convolution: checks and autograd.

Three ops, closed under differentiation (the gradient of each is made of the other two): ``conv2d_forward``
(x, values -> y), ``conv2d_input_grad`` (dy, values -> dx) and ``conv2d_weight_grad`` (x, dy -> dvalues, dbias). A
fourth, ``conv2d_backward``, is both gradients at once, for a backward pass on the CPU that nobody differentiates: where
a layer is streamed, dy is then read once for both. Images are logically (N, C, H, W) with any strides; outputs are
batch-last (stored C, H, W, N), in which layout inputs are read fastest. Where images are (K, N, C, H, W), those of K
clients that share the plan, so are all others, values and their gradients are (K, nnz), bias and its gradient (K, out):
docs/clients.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..plan import Plan
from .conv2d_kernels import (
    conv2d_backward,
    conv2d_forward,
    conv2d_input_grad,
    conv2d_weight_grad,
    has_backward,
    image_size,
    layer_sizes,
)
from .geometry import Pair, flatten, resolve_geometry
from .operands import MANY_CLIENTS, NATIVE, Backend, check_operands
from .registry import called_by_position
from .stored import refuse_graph, stored, stores

# ------------------------------------------------------------------------------------------------------ autograd

_ops: Any = torch.ops.fedpai

# Inside a backward pass that nobody will differentiate again (no create_graph), the gradients are asked of the ops
# themselves: an autograd node around each costs as much as a small layer.


@called_by_position
class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, geometry: list[int], stores: bool
    ) -> Tensor:
        return conv2d_forward(x, values, bias, plan.handle, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, _, ctx.plan, ctx.geometry, stores = inputs
        ctx.image = image_size(x)
        if stores:
            x = stored(x) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x, values)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        want_x, want_values, want_bias = ctx.needs_input_grad[:3]
        dx = dvalues = dbias = None
        again = torch.is_grad_enabled()
        if again:
            refuse_graph(x)
        elif want_x and want_values and has_backward(dy):
            dx, dvalues, dbias = conv2d_backward(x, dy, values, ctx.plan.handle, want_bias, ctx.geometry)
            return dx, dvalues, dbias if want_bias else None, None, None, None
        if want_x:
            if again:
                dx = _InputGrad.apply(dy, values, ctx.plan, *ctx.image, ctx.geometry)
            else:
                height, width = ctx.image
                dx = conv2d_input_grad(dy, values, ctx.plan.handle, height, width, ctx.geometry)
        if want_values:
            if again:
                dvalues, dbias = _WeightGrad.apply(x, dy, ctx.plan, want_bias, ctx.geometry)
            else:
                dvalues, dbias = conv2d_weight_grad(x, dy, ctx.plan.handle, want_bias, ctx.geometry)
        elif want_bias:
            dbias = dy.sum((-4, -2, -1), dtype=values.dtype)
        return dx, dvalues, dbias if want_bias else None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(
            "sparse_conv2d, sparse_linear: torch.func.vmap is not there for these; call them once with x of "
            "(K, N, C, H, W) or (K, ..., in) and values of (K, nnz), which are those of K clients"
        )


class _InputGrad(torch.autograd.Function):
    """dx(dy, values): linear in each, and its gradients are the other two ops."""

    @staticmethod
    def forward(dy: Tensor, values: Tensor, plan: Plan, height: int, width: int, geometry: list[int]) -> Tensor:
        return _ops.conv2d_input_grad(
            dy, values, plan.handle, height, width, geometry
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, values, ctx.plan, _, _, ctx.geometry = inputs
        ctx.save_for_backward(dy, values)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        dy, values = ctx.saved_tensors
        ddy = dvalues = None
        if ctx.needs_input_grad[0]:
            ddy = _Forward.apply(ddx, values, None, ctx.plan, ctx.geometry, False)
        if ctx.needs_input_grad[1]:
            dvalues, _ = _WeightGrad.apply(ddx, dy, ctx.plan, False, ctx.geometry)
        return ddy, dvalues, None, None, None, None


class _WeightGrad(torch.autograd.Function):
    """(dvalues, dbias)(x, dy): bilinear, and its gradients are the other two ops."""

    @staticmethod
    def forward(
        x: Tensor, dy: Tensor, plan: Plan, with_bias: bool, geometry: list[int]
    ) -> tuple[Tensor, Tensor]:
        return _ops.conv2d_weight_grad(
            x, dy, plan.handle, with_bias, geometry
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, dy, ctx.plan, ctx.with_bias, ctx.geometry = inputs
        ctx.save_for_backward(x, dy)

    @staticmethod
    def backward(ctx: Any, ddvalues: Tensor, ddbias: Tensor) -> tuple[Tensor | None, ...]:
        x, dy = ctx.saved_tensors
        dx = ddy = None
        if ctx.needs_input_grad[0]:
            dx = _InputGrad.apply(dy, ddvalues, ctx.plan, *image_size(x), ctx.geometry)
        if ctx.needs_input_grad[1]:
            ddy = _Forward.apply(x, ddvalues, ddbias if ctx.with_bias else None, ctx.plan, ctx.geometry, False)
        return dx, ddy, None, None, None


# -------------------------------------------------------------------------------------------------------- public


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    plan: Plan,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolution with the sparse weight ``plan.unpack(values)``, without ever forming it.

    ``torch.nn.functional.conv2d`` in all other respects: zero padding, cross-correlation. A weight outside the mask
    meets nothing: where dense-masked torch gives 0 * inf = NaN, this gives 0. Only neighbouring channels with
    nearly equal masks (a fill of at least 0.65; docs/numerics.md) may share what is not finite. Differentiable in x,
    values and bias, to any order. Deterministic for a given number of threads (``torch.get_num_threads()``).

    Several clients that share the plan may be computed at once, each with images, values and a bias of its own: what
    is said of one holds for each. A CUDA device computes them in one launch, the CPU one after the other with the bits
    of calls of their own (docs/clients.md).

    Args:
        x: (N, C, H, W) or (C, H, W), float32 or float64, any strides; batch-last is read fastest. N may be 0. On a
            CUDA device float32, or bfloat16 with float32 values and bias; the first call with a shape measures which
            kernels are fastest there, and torch's dense ones are among them (docs/gpu.md). Of K clients:
            (K, N, C, H, W). K may be 0.
        values: (plan.nnz,), the surviving weights in row-major order of the mask. Of K clients: (K, plan.nnz).
        plan: of kind "conv2d".
        bias: (out,) or None. Of K clients: (K, out).
        stride, dilation: pixels; an int or (vertical, horizontal).
        padding: pixels, an int or (vertical, horizontal), or "same" or "valid".
        groups: must be the plan's.
        activation_dtype: `torch.bfloat16` keeps a float32 x for the gradient of `values` rounded
            (:mod:`fedpai_kernels.ops.stored`); None keeps x as it is.

    Returns:
        (N, out, H', W') in batch-last layout, or (out, H', W'). Of K clients: (K, N, out, H', W'), stored K, out, H',
        W', N.

    Raises:
        TypeError: a wrong dtype, or operands that are not tensors.
        ValueError: shapes, devices or settings that do not fit, numbers of clients that differ, or an image smaller
            than the kernel.
        RuntimeError: on a CUDA device, the first call with a shape while a CUDA graph is being captured; under
            :func:`fedpai_kernels.dispatch.backend`, a layer that the backend cannot compute.
    """
    if has_torch_function_unary(x):
        settings = bias, stride, padding, dilation, groups
        return handle_torch_function(
            sparse_conv2d, (x,), x, values, plan, *settings, activation_dtype=activation_dtype
        )
    if isinstance(x, Tensor) and x.dim() == 3:
        y = sparse_conv2d(
            x.unsqueeze(0), values, plan, bias, stride, padding, dilation, groups, activation_dtype=activation_dtype
        )
        return y.squeeze(0)
    geometry = checked_geometry(x, values, plan, bias, stride, padding, dilation, groups, MANY_CLIENTS)
    return differentiable_conv2d(x, values, bias, plan, geometry, stores(x, activation_dtype))


def differentiable_conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, geometry: list[int], stores: bool = False
) -> Tensor:
    """The registered op with its gradients. Arguments are not checked: see :func:`checked_geometry`.

    `stores`: as :func:`fedpai_kernels.ops.stored.stores` says.
    """
    y: Tensor = _Forward.apply(x, values, bias, plan, geometry, stores)
    return y


def checked_geometry(
    x: Tensor,
    values: Tensor,
    plan: Plan,
    bias: Tensor | None,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
    backend: Backend = NATIVE,
) -> list[int]:
    """The geometry of a convolution as it travels, after every check of :func:`sparse_conv2d`; x: (N, C, H, W), or
    (K, N, C, H, W) where the backend takes several clients.
    """
    check_operands(x, values, plan, bias, backend)
    if plan.kind != "conv2d":
        raise ValueError(f"plan: expected one of kind 'conv2d', got kind {plan.kind!r} of shape {plan.mask_shape}")
    if groups != plan.groups:
        raise ValueError(f"groups: the plan was made for {plan.groups}, got {groups}")
    if x.dim() != 3 + values.dim():
        wanted = "(N, C, H, W) or (C, H, W)" if values.dim() == 1 else "(K, N, C, H, W), as values are (K, nnz)"
        raise ValueError(f"x: expected {wanted}, got shape {tuple(x.shape)}")
    _, in_channels, kernel = layer_sizes(plan)
    if x.shape[-3] != in_channels:
        raise ValueError(f"x: expected {in_channels} channels, got shape {tuple(x.shape)}")
    if min(image_size(x)) == 0:
        raise ValueError(f"x: an image needs at least one pixel, got shape {tuple(x.shape)}")
    geometry = resolve_geometry(kernel, stride, padding, dilation)
    output = geometry.output_size(image_size(x), kernel)
    if min(output) <= 0:
        raise ValueError(
            f"x: an image of {x.shape[-2]} x {x.shape[-1]} is too small for a kernel of {kernel[0]} x {kernel[1]} "
            f"with padding {padding} and dilation {dilation}"
        )
    return flatten(geometry)
