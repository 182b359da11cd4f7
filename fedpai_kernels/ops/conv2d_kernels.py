# SPDX-License-Identifier: Apache-2.0
"""The registered ops of the sparse convolution: their fake versions, and their implementations for the CPU. What they
compute is said in :mod:`fedpai_kernels.ops.conv2d`, which checks their arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..layout import empty_batch_last, to_batch_last
from ..plan import Plan, plan_of
from .geometry import Pair, compiled_geometry, unflatten
from .registry import LIBRARY, Operation
from .stored import widened

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
_FORWARD = {dtype: getattr(_C, f"conv2d_forward_{suffix}") for dtype, suffix in _SUFFIX.items()}
_INPUT_GRAD = {dtype: getattr(_C, f"conv2d_input_grad_{suffix}") for dtype, suffix in _SUFFIX.items()}
_WEIGHT_GRAD = {dtype: getattr(_C, f"conv2d_weight_grad_{suffix}") for dtype, suffix in _SUFFIX.items()}
_BACKWARD = {dtype: getattr(_C, f"conv2d_backward_{suffix}") for dtype, suffix in _SUFFIX.items()}


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


def has_backward(t: Tensor) -> bool:
    """Whether `conv2d_backward` is there for the device of `t`; elsewhere the two ops are called."""
    return t.is_cpu


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

conv2d_forward = Operation("conv2d_forward", _forward_cpu)
conv2d_input_grad = Operation("conv2d_input_grad", _input_grad_cpu)
conv2d_weight_grad = Operation("conv2d_weight_grad", _weight_grad_cpu)
conv2d_backward = Operation("conv2d_backward", _backward_cpu)
