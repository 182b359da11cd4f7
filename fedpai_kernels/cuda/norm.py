# SPDX-License-Identifier: Apache-2.0
"""The ops of batch norm for CUDA tensors: what ``ops/norm_kernels.py`` and ``ops/norm_conv2d.py`` define, launched on
the device.

Activations are float32 or bfloat16; parameters, statistics and their gradients float32. Nothing here waits for the
device. A convolution that reads a norm alone is given the normalised activation in memory that is free again when the
call returns; what is kept for the backward pass is the norm's input, as on the CPU.
"""

from __future__ import annotations

from ctypes import byref, c_int64

import torch
from torch import Tensor

from ..layout import empty_batch_last, to_batch_last
from ..ops.norm_kernels import backward_by, row_of
from ..ops.registry import LIBRARY
from . import library


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _batch_last(t: Tensor | None) -> Tensor | None:
    return None if t is None else to_batch_last(t)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _norm(x: Tensor, activation: int = 0, slope: float = 0.0) -> library.Norm:
    return library.Norm(x.shape[1], row_of(x), library.DTYPES[x.dtype], activation, slope)


def _stats(rows: int, x: Tensor) -> Tensor:
    return torch.empty(rows, x.shape[1], dtype=torch.float32, device=x.device)


def _workspace(cuda: library.Library, norm: library.Norm, device: torch.device) -> tuple[Tensor, int]:
    """The sums of all blocks, and how many bytes they are."""
    needed = c_int64(0)
    cuda.call("norm_workspace", byref(norm), byref(needed))
    return torch.empty(needed.value, dtype=torch.uint8, device=device), needed.value


# ---- forward ------------------------------------------------------------------------------------------


def _run_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, float],
    eps: float,
    activation: int,
    slope: float,
    y: Tensor | None,
) -> Tensor:
    """The stats of `x`, batch-last; y is written where there is one, and so are running mean and variance."""
    residual, weight, bias = _batch_last(residual), _contiguous(weight), _contiguous(bias)
    mean, var, momentum = running
    with library.on(x.device) as (cuda, stream):
        norm, stats = _norm(x, activation, slope), _stats(3, x)
        workspace, size = _workspace(cuda, norm, x.device)
        cuda.call(
            "norm_train", byref(norm), x.data_ptr(), _address(residual), _address(weight), _address(bias), eps,
            _address(mean), _address(var), momentum, _address(y), stats.data_ptr(), workspace.data_ptr(), size, stream,
        )  # fmt: skip
    return stats


def _train_running(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name}: it is changed in place, so it must be contiguous, got strides {t.stride()}")
    x = to_batch_last(x)
    y = empty_batch_last(x.shape, dtype=x.dtype, device=x.device)
    running = running_mean, running_var, momentum
    return y, _run_train(x, residual, weight, bias, running, eps, activation, slope, y)


def _train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return _train_running(x, residual, weight, bias, None, None, 0.0, eps, activation, slope)


def _statistics(x: Tensor, eps: float) -> Tensor:
    return _run_train(to_batch_last(x), None, None, None, (None, None, 0.0), eps, 0, 0.0, None)


def _eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: int,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    x, residual, weight, bias = to_batch_last(x), _batch_last(residual), _contiguous(weight), _contiguous(bias)
    mean, var = mean.contiguous(), var.contiguous()
    with library.on(x.device) as (cuda, stream):
        y, stats = empty_batch_last(x.shape, dtype=x.dtype, device=x.device), _stats(2, x)
        cuda.call(
            "norm_eval", byref(_norm(x, activation, slope)), x.data_ptr(), _address(residual), _address(weight),
            _address(bias), mean.data_ptr(), var.data_ptr(), eps, y.data_ptr(), stats.data_ptr(), stream,
        )  # fmt: skip
    return y, stats


def _given_statistics(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    mean, var = mean.contiguous(), var.contiguous()
    with library.on(mean.device) as (cuda, stream):
        stats = torch.empty(2, mean.shape[0], dtype=torch.float32, device=mean.device)
        norm = library.Norm(mean.shape[0], 1, library.DTYPES[torch.float32], 0, 0.0)
        cuda.call(
            "norm_eval", byref(norm), None, None, None, None, mean.data_ptr(), var.data_ptr(), eps, None,
            stats.data_ptr(), stream,
        )  # fmt: skip
    return stats


# ---- backward -----------------------------------------------------------------------------------------


def _run_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    through_statistics: bool,
    activation: int,
    slope: float,
    dx: Tensor | None,
    dresidual: Tensor | None,
    need_affine: bool,
) -> Tensor:
    """The gradients of weight and bias of `dy`, batch-last; dx, which may be dy, and dresidual are written."""
    x, z, weight, bias = to_batch_last(x), _batch_last(z), _contiguous(weight), _contiguous(bias)
    stats = stats.contiguous()
    with library.on(dy.device) as (cuda, stream):
        norm, affine = _norm(x, activation, slope), _stats(2 if need_affine else 0, x)
        dweight, dbias = affine if need_affine else (None, None)
        workspace, size = _workspace(cuda, norm, dy.device)
        cuda.call(
            "norm_backward", byref(norm), dy.data_ptr(), x.data_ptr(), _address(z), _address(weight), _address(bias),
            stats.data_ptr(), int(through_statistics), _address(dx), _address(dresidual), _address(dweight),
            _address(dbias), workspace.data_ptr(), size, stream,
        )  # fmt: skip
    return affine


_backward, _backward_in_place = backward_by(_run_backward)


# ---- with the convolution after it --------------------------------------------------------------------


def _applied(
    x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, activation: int, slope: float
) -> Tensor:
    """activation(norm(x)) with these stats."""
    x, stats, weight, bias = to_batch_last(x), stats.contiguous(), _contiguous(weight), _contiguous(bias)
    with library.on(x.device) as (cuda, stream):
        y = empty_batch_last(x.shape, dtype=x.dtype, device=x.device)
        cuda.call(
            "norm_apply", byref(_norm(x, activation, slope)), x.data_ptr(), _address(weight), _address(bias),
            stats.data_ptr(), y.data_ptr(), stream,
        )  # fmt: skip
    return y


def _norm_conv2d_forward(
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
    h = _applied(x, stats, norm_weight, norm_bias, activation, slope)
    y: Tensor = torch.ops.fedpai.conv2d_forward(h, values, bias, plan, geometry)
    return y


def _norm_conv2d_weight_grad(
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
    h = _applied(x, stats, norm_weight, norm_bias, activation, slope)
    grads: tuple[Tensor, Tensor] = torch.ops.fedpai.conv2d_weight_grad(h, dy, plan, with_bias, geometry)
    return grads


LIBRARY.impl("batch_norm_train", _train, "CUDA")
LIBRARY.impl("batch_norm_train_running", _train_running, "CUDA")
LIBRARY.impl("batch_norm_statistics", _statistics, "CUDA")
LIBRARY.impl("batch_norm_given_statistics", _given_statistics, "CUDA")
LIBRARY.impl("batch_norm_eval", _eval, "CUDA")
LIBRARY.impl("batch_norm_backward", _backward, "CUDA")
LIBRARY.impl("batch_norm_backward_", _backward_in_place, "CUDA")
LIBRARY.impl("norm_conv2d_forward", _norm_conv2d_forward, "CUDA")
LIBRARY.impl("norm_conv2d_weight_grad", _norm_conv2d_weight_grad, "CUDA")
