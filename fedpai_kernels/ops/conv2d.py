# SPDX-License-Identifier: Apache-2.0
"""Sparse-weight 2-D convolution: checks, registered ops, autograd.

Three ops, closed under differentiation (the gradient of each is made of the other two): ``conv2d_forward``
(x, values -> y), ``conv2d_input_grad`` (dy, values -> dx) and ``conv2d_weight_grad`` (x, dy -> dvalues, dbias). Images
are logically (N, C, H, W) with any strides; outputs are batch-last (stored C, H, W, N), in which layout inputs are read
fastest. Where images are (K, N, C, H, W), those of K clients that share the plan, so are all others, values and their
gradients are (K, nnz), bias and its gradient (K, out): docs/clients.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _C
from ..layout import empty_batch_last, to_batch_last
from ..plan import Plan, plan_of
from .geometry import Pair, compiled_geometry, flatten, resolve_geometry, unflatten
from .operands import MANY_CLIENTS, NATIVE, Backend, check_operands
from .registry import LIBRARY, Operation, called_by_position
from .stored import refuse_graph, stored, stores, widened

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
_FORWARD = {dtype: getattr(_C, f"conv2d_forward_{suffix}") for dtype, suffix in _SUFFIX.items()}
_INPUT_GRAD = {dtype: getattr(_C, f"conv2d_input_grad_{suffix}") for dtype, suffix in _SUFFIX.items()}
_WEIGHT_GRAD = {dtype: getattr(_C, f"conv2d_weight_grad_{suffix}") for dtype, suffix in _SUFFIX.items()}
_BACKWARD = {dtype: getattr(_C, f"conv2d_backward_{suffix}") for dtype, suffix in _SUFFIX.items()}


# ------------------------------------------------------------------------------------------------ registered ops

# geometry, as it travels: stride, pad_front, pad_back, dilation, two ints each
_GEOMETRY_ARGUMENTS = "int[] geometry"
LIBRARY.define(f"conv2d_forward(Tensor x, Tensor values, Tensor? bias, int plan, {_GEOMETRY_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    "conv2d_input_grad(Tensor dy, Tensor values, int plan, SymInt height, SymInt width, "
    f"{_GEOMETRY_ARGUMENTS}) -> Tensor"
)
LIBRARY.define(
    f"conv2d_weight_grad(Tensor x, Tensor dy, int plan, bool with_bias, {_GEOMETRY_ARGUMENTS}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"conv2d_backward(Tensor x, Tensor dy, Tensor values, int plan, bool with_bias, {_GEOMETRY_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)"
)

# What the ops return, not computed yet: their fake versions, and what the kernels of every device write into.


@torch.library.register_fake("fedpai::conv2d_forward", lib=LIBRARY)
def empty_output(x: Tensor, values: Tensor, bias: Tensor | None, plan: int, geometry: list[int]) -> Tensor:
    out_channels, _, kernel = layer_sizes(plan_of(plan))
    output = unflatten(geometry).output_size(image_size(x), kernel)
    return empty_batch_last((*x.shape[:-3], out_channels, *output), dtype=x.dtype, device=x.device)


@torch.library.register_fake("fedpai::conv2d_input_grad", lib=LIBRARY)
def empty_input_grad(dy: Tensor, values: Tensor, plan: int, height: int, width: int, geometry: list[int]) -> Tensor:
    _, in_channels, _ = layer_sizes(plan_of(plan))
    return empty_batch_last((*dy.shape[:-3], in_channels, height, width), dtype=dy.dtype, device=dy.device)


@torch.library.register_fake("fedpai::conv2d_weight_grad", lib=LIBRARY)
def empty_weight_grad(
    x: Tensor, dy: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    layer = plan_of(plan)
    out_channels, _, _ = layer_sizes(layer)
    # bfloat16 images, which CUDA tensors may be, have float32 weights.
    dtype = torch.float32 if dy.dtype == torch.bfloat16 else dy.dtype
    clients = dy.shape[:-4]
    dvalues = dy.new_empty((*clients, layer.nnz), dtype=dtype)
    return dvalues, dy.new_empty((*clients, out_channels if with_bias else 0), dtype=dtype)


@torch.library.register_fake("fedpai::conv2d_backward", lib=LIBRARY)
def empty_backward(
    x: Tensor, dy: Tensor, values: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty_input_grad(dy, values, plan, *image_size(x), geometry)
    return dx, *empty_weight_grad(x, dy, plan, with_bias, geometry)


def layer_sizes(plan: Plan) -> tuple[int, int, Pair]:
    """Output channels, input channels, kernel."""
    shape = plan.mask_shape
    kernel = (shape[2], shape[3]) if plan.kind == "conv2d" else (1, 1)
    return shape[0], shape[1] * plan.groups, kernel


def image_size(images: Tensor) -> Pair:
    """Height, width."""
    return images.shape[-2], images.shape[-1]


def each_client(images: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors of one client after the other; as they are, once, where images are those of one: (N, C, H, W)."""
    if images.dim() == 4:
        yield images, *others
        return
    for client in range(images.shape[0]):
        yield images[client], *(None if t is None else t[client] for t in others)


def _readable(t: Tensor) -> Tensor:
    """``t`` itself where the kernels read it at speed, a batch-last copy otherwise.

    A batch of one has no neighbours, and the rows of a matrix are transposed while they are packed, so those are always
    read in place.
    """
    if t.shape[-4] == 1 or t.stride(-4) == 1 or t.shape[-2] * t.shape[-1] == 1:
        return t
    return to_batch_last(t)


def _strides(t: Tensor) -> tuple[int, ...]:
    n, *rest = t.stride()
    # The stride of a batch of one means nothing; 1 lets the kernels take their fast path.
    return (1 if t.shape[0] == 1 else n, *rest)


def _forward_cpu(x: Tensor, values: Tensor, bias: Tensor | None, plan: int, geometry: list[int]) -> Tensor:
    return run_forward(x, (), values, bias, plan, geometry)


def run_forward(
    x: Tensor, norm: Sequence[int], values: Tensor, bias: Tensor | None, plan: int, geometry: list[int]
) -> Tensor:
    """`norm`: empty, or what the binding takes for the batch norm (and ReLU) that x goes through first; x is
    batch-last then."""
    layer = plan_of(plan)
    result = empty_output(x, values, bias, plan, geometry)
    for own_x, own_values, own_bias, y in each_client(x, values, bias, result):
        source, weights = _readable(own_x), own_values.contiguous()
        offsets = None if own_bias is None else own_bias.contiguous()
        _FORWARD[x.dtype](
            layer.compiled, compiled_geometry(source.shape[0], image_size(source), image_size(y), geometry),
            source.data_ptr(), _strides(source), norm, weights.data_ptr(),
            0 if offsets is None else offsets.data_ptr(), y.data_ptr(), _strides(y), torch.get_num_threads(),
        )  # fmt: skip
    return result


def _input_grad_cpu(dy: Tensor, values: Tensor, plan: int, height: int, width: int, geometry: list[int]) -> Tensor:
    layer = plan_of(plan)
    result = empty_input_grad(dy, values, plan, height, width, geometry)
    for own_dy, own_values, dx in each_client(dy, values, result):
        source, weights = _readable(own_dy), own_values.contiguous()
        _INPUT_GRAD[dy.dtype](
            layer.compiled, compiled_geometry(source.shape[0], (height, width), image_size(source), geometry),
            source.data_ptr(), _strides(source), weights.data_ptr(), dx.data_ptr(), _strides(dx),
            torch.get_num_threads(),
        )  # fmt: skip
    return result


def _weight_grad_cpu(
    x: Tensor, dy: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    return run_weight_grad(x, (), dy, plan, with_bias, geometry)


def run_weight_grad(
    x: Tensor, norm: Sequence[int], dy: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    """`norm`: as in :func:`run_forward`. x may be float32 that was rounded to bfloat16."""
    layer = plan_of(plan)
    result = empty_weight_grad(x, dy, plan, with_bias, geometry)
    for own_x, own_dy, dvalues, dbias in each_client(x, dy, *result):
        source, grad = widened(_readable(own_x)), _readable(own_dy)
        _WEIGHT_GRAD[grad.dtype](
            layer.compiled, compiled_geometry(source.shape[0], image_size(source), image_size(grad), geometry),
            source.data_ptr(), _strides(source), norm, grad.data_ptr(), _strides(grad), dvalues.data_ptr(),
            dbias.data_ptr() if with_bias else 0, torch.get_num_threads(),
        )  # fmt: skip
    return result


def _backward_cpu(
    x: Tensor, dy: Tensor, values: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return run_backward(x, (), dy, values, plan, with_bias, geometry)


def run_backward(
    x: Tensor, norm: Sequence[int], dy: Tensor, values: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm`, x: as in :func:`run_weight_grad`. The gradient of x is that behind the norm."""
    layer = plan_of(plan)
    result = empty_backward(x, dy, values, plan, with_bias, geometry)
    for own_x, own_dy, own_values, dx, dvalues, dbias in each_client(x, dy, values, *result):
        source, grad, weights = widened(_readable(own_x)), _readable(own_dy), own_values.contiguous()
        _BACKWARD[grad.dtype](
            layer.compiled, compiled_geometry(source.shape[0], image_size(source), image_size(grad), geometry),
            source.data_ptr(), _strides(source), norm, grad.data_ptr(), _strides(grad), weights.data_ptr(),
            dx.data_ptr(), _strides(dx), dvalues.data_ptr(), dbias.data_ptr() if with_bias else 0,
            torch.get_num_threads(),
        )  # fmt: skip
    return result


LIBRARY.impl("conv2d_forward", _forward_cpu, "CPU")
LIBRARY.impl("conv2d_input_grad", _input_grad_cpu, "CPU")
LIBRARY.impl("conv2d_weight_grad", _weight_grad_cpu, "CPU")
LIBRARY.impl("conv2d_backward", _backward_cpu, "CPU")


# ------------------------------------------------------------------------------------------------------ autograd

_ops: Any = torch.ops.fedpai

conv2d_forward = Operation("conv2d_forward", _forward_cpu)
conv2d_input_grad = Operation("conv2d_input_grad", _input_grad_cpu)
conv2d_weight_grad = Operation("conv2d_weight_grad", _weight_grad_cpu)
conv2d_backward = Operation("conv2d_backward", _backward_cpu)

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
        elif want_x and want_values and dy.is_cpu:
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
