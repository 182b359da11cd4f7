# SPDX-License-Identifier: Apache-2.0
"""The ways in which a masked layer can be computed on a CUDA device.

    sparse    csrc/cuda: each surviving weight by itself; any mask
    blocks    Triton: blocks of 16 to 128 channels by the tensor cores; masks made of whole blocks
    dense     torch: a dense weight with zeros outside of the mask; the dense weight gradient, of which the survivors
              are gathered

Each computes the three ops of :mod:`fedpai_kernels.ops.conv2d`, takes their arguments, and returns what they return:
images batch-last, gradients of weights in the dtype of the weights. So each may serve one direction and another the
next, and the time that one needs to change a layout is its own. Several clients are one launch of the sparse kernels;
the others compute them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from ..cuda import conv2d as sparse_kernels
from ..cuda import library
from ..layout import to_batch_last
from ..ops.conv2d_kernels import empty_input_grad, empty_output, empty_weight_grad, layer_sizes
from ..ops.geometry import Geometry, Pair, unflatten
from ..plan import Plan, plan_of
from ..triton.block_plan import BlockPlan
from ..triton.runtime import HALF_OR_SINGLE

Op = Callable[..., Any]


@dataclass(frozen=True)
class Candidate:
    """One way of computing a layer.

    Attributes:
        name: what people call it.
        check: takes the plan and an image tensor; raises RuntimeError, ValueError or TypeError where the candidate
            cannot compute such a layer here, with what would have to be otherwise.
        forward, input_grad, weight_grad: the ops, with the arguments of the registered ones.
    """

    name: str
    check: Callable[[Plan, Tensor], None]
    forward: Op
    input_grad: Op
    weight_grad: Op


def weight_dtype(images: Tensor) -> torch.dtype:
    """Of the values that belong to such images."""
    return torch.float32 if images.dtype == torch.bfloat16 else images.dtype


def precision() -> tuple[str, str]:
    """In what torch may multiply float32: in convolutions, and in matrix products. "tf32" or something else."""
    backends: Any = torch.backends
    return backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision


def _client_by_client(op: Op, empty: Op) -> Op:
    """`op`, which computes one client, for several too: one after the other, copied into what `empty` allocates."""

    @wraps(op)
    def run(images: Tensor, *arguments: Any) -> Any:
        if images.dim() == 4:
            return op(images, *arguments)
        result = empty(images, *arguments)
        whole = (result,) if isinstance(result, Tensor) else result
        for client in range(images.shape[0]):
            own = op(*(a[client] if isinstance(a, Tensor) else a for a in (images, *arguments)))
            for all_clients, one in zip(whole, (own,) if isinstance(own, Tensor) else own, strict=True):
                all_clients[client] = one
        return result

    return run


# ---- sparse -----------------------------------------------------------------------------------------------------


def _check_sparse(plan: Plan, images: Tensor) -> None:
    library.load()
    if images.dtype not in library.DTYPES:
        raise TypeError(f"the CUDA kernels take float32 and bfloat16 images, got {images.dtype}")


SPARSE = Candidate(
    "sparse", _check_sparse, sparse_kernels.forward, sparse_kernels.input_grad, sparse_kernels.weight_grad
)


# ---- blocks -----------------------------------------------------------------------------------------------------
# bfloat16 images have float32 values, which are rounded for the tensor cores, as torch's autocast does.


_ops: Any = torch.ops.fedpai


def _check_blocks(plan: Plan, images: Tensor) -> None:
    HALF_OR_SINGLE.check_device(images)
    if images.dtype not in HALF_OR_SINGLE.dtypes(images):
        raise TypeError(f"the block kernels take float32, float16 and bfloat16 images, got {images.dtype}")
    BlockPlan.of(plan)


def _block_setting(plan: int, geometry: list[int]) -> tuple[int, int, str, list[int]]:
    return plan, BlockPlan.of(plan_of(plan)).block, "tf32" if precision()[0] == "tf32" else "ieee", geometry


def _blocks_forward(x: Tensor, values: Tensor, bias: Tensor | None, plan: int, geometry: list[int]) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return _ops.block_conv2d_forward(to_batch_last(x), values.to(x.dtype), bias, *_block_setting(plan, geometry))


def _blocks_input_grad(
    dy: Tensor, values: Tensor, plan: int, height: int, width: int, geometry: list[int]
) -> Tensor:
    setting = _block_setting(plan, geometry)
    return _ops.block_conv2d_input_grad(to_batch_last(dy), values.to(dy.dtype), height, width, *setting)


def _blocks_weight_grad(
    x: Tensor, dy: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    x, dy = to_batch_last(x), to_batch_last(dy)
    dvalues, _ = _ops.block_conv2d_weight_grad(x, dy, False, *_block_setting(plan, geometry))
    return dvalues.to(weight_dtype(dy)), _bias_grad(dy, with_bias)


BLOCKS = Candidate(
    "blocks",
    _check_blocks,
    _client_by_client(_blocks_forward, empty_output),
    _client_by_client(_blocks_input_grad, empty_input_grad),
    _client_by_client(_blocks_weight_grad, empty_weight_grad),
)


# ---- dense ------------------------------------------------------------------------------------------------------
# A convolution of single pixels is a matrix product, and batch-last images are matrices (channels, pixels x batch), so
# nothing changes its layout. Other convolutions are cuDNN's, in channels-last, its own order on tensor cores.


def _check_dense(plan: Plan, images: Tensor) -> None:
    """Whatever torch takes."""


def _is_product(layer: Plan, g: Geometry) -> bool:
    unpadded = not any((*g.pad_front, *g.pad_back))
    return layer_sizes(layer)[2] == (1, 1) and g.stride == (1, 1) and unpadded and layer.groups == 1


def _weight(layer: Plan, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a convolution, dense."""
    shape = layer.mask_shape if layer.kind == "conv2d" else (*layer.mask_shape, 1, 1)
    return layer.unpack(values).to(dtype).reshape(shape)


def _matrix(images: Tensor) -> Tensor:
    """(N, C, H, W) as (C, H * W * N): a view of batch-last images."""
    batch, channels, height, width = images.shape
    return to_batch_last(images).permute(1, 2, 3, 0).reshape(channels, height * width * batch)


def _images(matrix: Tensor, batch: int, image: Pair) -> Tensor:
    """Back again."""
    return matrix.view(len(matrix), *image, batch).permute(3, 0, 1, 2)


def _padded(x: Tensor, g: Geometry) -> tuple[Tensor, Pair]:
    """`x` with the padding that torch's convolution has no argument for, and the padding that is left to it."""
    if g.pad_front != g.pad_back:
        x = F.pad(x, (g.pad_front[1], g.pad_back[1], g.pad_front[0], g.pad_back[0]))
        return x.contiguous(memory_format=torch.channels_last), (0, 0)
    return x.contiguous(memory_format=torch.channels_last), g.pad_front


def _bias_grad(dy: Tensor, with_bias: bool) -> Tensor:
    dtype = weight_dtype(dy)
    return dy.sum((0, 2, 3), dtype=dtype) if with_bias else dy.new_empty(0, dtype=dtype)


def _dense_forward(x: Tensor, values: Tensor, bias: Tensor | None, plan: int, geometry: list[int]) -> Tensor:
    layer, g = plan_of(plan), unflatten(geometry)
    weight, bias = _weight(layer, values, x.dtype), None if bias is None else bias.to(x.dtype)
    if _is_product(layer, g):
        flat, source = weight.flatten(1), _matrix(x)
        y = flat @ source if bias is None else torch.addmm(bias[:, None], flat, source)
        return _images(y, x.shape[0], (x.shape[2], x.shape[3]))
    x, padding = _padded(x, g)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return to_batch_last(F.conv2d(x, weight, bias, g.stride, padding, g.dilation, layer.groups))


def _dense_input_grad(
    dy: Tensor, values: Tensor, plan: int, height: int, width: int, geometry: list[int]
) -> Tensor:
    layer, g = plan_of(plan), unflatten(geometry)
    weight = _weight(layer, values, dy.dtype)
    if _is_product(layer, g):
        return _images(weight.flatten(1).t() @ _matrix(dy), dy.shape[0], (height, width))
    size, padding, first = [dy.shape[0], layer_sizes(layer)[1], height, width], g.pad_front, (0, 0)
    if g.pad_front != g.pad_back:
        first, padding = g.pad_front, (0, 0)
        size[2:] = [n + front + back for n, front, back in zip(size[2:], g.pad_front, g.pad_back, strict=True)]
    dy = dy.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    dx = conv_grad.conv2d_input(size, weight, dy, g.stride, padding, g.dilation, layer.groups)
    return to_batch_last(dx[:, :, first[0] : first[0] + height, first[1] : first[1] + width])


def _dense_weight_grad(
    x: Tensor, dy: Tensor, plan: int, with_bias: bool, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    layer, g = plan_of(plan), unflatten(geometry)
    if _is_product(layer, g):
        dense = _matrix(dy) @ _matrix(x).t()
    else:
        source, padding = _padded(x, g)
        grad = dy.contiguous(memory_format=torch.channels_last)
        dense = conv_grad.conv2d_weight(
            source, list(layer.mask_shape), grad, g.stride, padding, g.dilation, layer.groups
        )
    return layer.pack(dense.reshape(layer.mask_shape)).to(weight_dtype(dy)), _bias_grad(dy, with_bias)


DENSE = Candidate(
    "dense",
    _check_dense,
    _client_by_client(_dense_forward, empty_output),
    _client_by_client(_dense_input_grad, empty_input_grad),
    _client_by_client(_dense_weight_grad, empty_weight_grad),
)

ALL = (SPARSE, BLOCKS, DENSE)
"""In the order in which reports name them."""
