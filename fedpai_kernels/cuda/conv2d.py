# SPDX-License-Identifier: Apache-2.0
"""The sparse convolution on a CUDA device: the three ops that ``ops/conv2d.py`` defines, launched.

:mod:`fedpai_kernels.dispatch` calls them where it chooses the sparse kernels. Images are float32 or bfloat16; values,
bias and their gradients float32. Images of several clients go into one launch. Nothing here waits for the device.
"""

from __future__ import annotations

from ctypes import byref, c_int64

import torch
from torch import Tensor

from ..layout import empty_batch_last, to_batch_last
from ..ops.conv2d_kernels import empty_input_grad, empty_output, empty_weight_grad, image_size, layer_sizes
from ..ops.geometry import Geometry, Pair, unflatten
from ..plan import Plan, plan_of
from . import library
from .device_plan import device_plan


def _readable(t: Tensor) -> Tensor:
    """`t`, or a copy of it, in batch-last storage without gaps, from where vectors of four elements can be read."""
    t = to_batch_last(t)
    aligned = t.shape[-4] % 4 != 0 or t.data_ptr() % (4 * t.element_size()) == 0
    return t if aligned else empty_batch_last(tuple(t.shape), dtype=t.dtype, device=t.device).copy_(t)


def _sizes(layer: Plan, images: Tensor, image: Pair, output: Pair, g: Geometry) -> library.Conv2d:
    """`images`: those that are read."""
    out_channels, in_channels, _ = layer_sizes(layer)
    clients = images.shape[0] if images.dim() == 5 else 1
    return library.Conv2d(
        clients, images.shape[-4], in_channels, *image, out_channels, *output, *g.stride, library.DTYPES[images.dtype]
    )


def forward(x: Tensor, values: Tensor, bias: Tensor | None, plan: int, geometry: list[int]) -> Tensor:
    layer, g = plan_of(plan), unflatten(geometry)
    y = empty_output(x, values, bias, plan, geometry)
    with library.on(x.device) as (cuda, stream):
        x, values = _readable(x), values.contiguous()
        bias = None if bias is None else bias.contiguous()
        conv = _sizes(layer, x, image_size(x), image_size(y), g)
        rows = device_plan(layer).rows(x.device, "forward", g, y.shape[-3])
        cuda.call(
            "conv2d_forward", byref(conv), byref(rows), x.data_ptr(), values.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), stream,
        )  # fmt: skip
    return y


def input_grad(dy: Tensor, values: Tensor, plan: int, height: int, width: int, geometry: list[int]) -> Tensor:
    layer, g = plan_of(plan), unflatten(geometry)
    dx = empty_input_grad(dy, values, plan, height, width, geometry)
    with library.on(dy.device) as (cuda, stream):
        dy, values = _readable(dy), values.contiguous()
        conv = _sizes(layer, dy, (height, width), image_size(dy), g)
        rows = device_plan(layer).rows(dy.device, "input_grad", g, dx.shape[-3])
        cuda.call(
            "conv2d_input_grad", byref(conv), byref(rows), dy.data_ptr(), values.data_ptr(), dx.data_ptr(), stream
        )
    return dx


def weight_grad(
    x: Tensor, dy: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    layer, g = plan_of(plan), unflatten(geometry)
    dvalues, dbias = empty_weight_grad(x, dy, plan, with_bias, geometry)
    with library.on(x.device) as (cuda, stream):
        x, dy = _readable(x), _readable(dy)
        conv = _sizes(layer, x, image_size(x), image_size(dy), g)
        groups = device_plan(layer).groups(x.device, g)
        needed = c_int64(0)
        cuda.call("conv2d_weight_grad_workspace", byref(conv), byref(groups), byref(needed))
        workspace = torch.empty(needed.value, dtype=torch.uint8, device=x.device)
        cuda.call(
            "conv2d_weight_grad", byref(conv), byref(groups), x.data_ptr(), dy.data_ptr(), dvalues.data_ptr(),
            dbias.data_ptr() if with_bias else None, workspace.data_ptr(), needed.value, stream,
        )  # fmt: skip
    return dvalues, dbias
