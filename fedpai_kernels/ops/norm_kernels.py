# SPDX-License-Identifier: Apache-2.0
"""The registered ops of batch norm, and their fake versions. Their arguments are checked in
:mod:`fedpai_kernels.ops.norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..layout import empty_batch_last, to_batch_last
from .registry import LIBRARY

_TRAIN = {torch.float32: _C.batch_norm_train_f32, torch.float64: _C.batch_norm_train_f64}
_EVAL = {torch.float32: _C.batch_norm_eval_f32, torch.float64: _C.batch_norm_eval_f64}
_BACKWARD = {torch.float32: _C.batch_norm_backward_f32, torch.float64: _C.batch_norm_backward_f64}

DTYPES = tuple(_TRAIN)

# ---- the ops: batch-last in and out
# -----------------------------------------------------------------------------

# stats: (3, C) mean, 1 / sqrt(var + eps), unbiased variance; of given statistics (2, C), without the last.
LIBRARY.define(
    "batch_norm_train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool relu)"
    " -> (Tensor, Tensor)"
)
# The stats of x alone.
LIBRARY.define("batch_norm_statistics(Tensor x, float eps) -> Tensor")
LIBRARY.define(
    "batch_norm_eval(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
    " float eps, bool relu) -> (Tensor, Tensor)"
)
# x and z may be float32 that was rounded to bfloat16 (both, or neither).
# (dx, (2, C) gradients of weight and bias, gradient of the residual); what is not needed comes back with no
# elements. z: what the forward op returned, where that had a residual and a ReLU; only then is the residual's
# gradient another tensor than dy, and need_residual allowed.
LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? z, Tensor? weight, Tensor? bias, Tensor stats,"
    " bool through_statistics, bool relu, bool need_x, bool need_affine, bool need_residual)"
    " -> (Tensor, Tensor, Tensor)"
)
# Without a residual; dy, batch-last, becomes dx where that is needed. Returns the gradients of weight and bias.
LIBRARY.define(
    "batch_norm_backward_(Tensor(a!) dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats,"
    " bool through_statistics, bool relu, bool need_x, bool need_affine) -> Tensor"
)


def row_of(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _batch_last(t: Tensor | None) -> Tensor | None:
    return None if t is None else to_batch_last(t)


def _as_kernels_read(
    x: Tensor, other: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The operands with the strides that the kernels take: activations batch-last, parameters contiguous.
    `other` is the residual, or in the backward op the result."""
    return to_batch_last(x), _batch_last(other), _contiguous(weight), _contiguous(bias)


def _train(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    x, residual, weight, bias = _as_kernels_read(x, residual, weight, bias)
    y = empty_batch_last(x.shape, dtype=x.dtype, device=x.device)
    return y, _run_train(x, residual, weight, bias, eps, relu, y)


def _run_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    y: Tensor | None,
) -> Tensor:
    """The stats; y is written where there is one."""
    stats = x.new_empty(3, x.shape[1])
    mean, row_bytes = stats.data_ptr(), stats.shape[1] * stats.element_size()
    _TRAIN[x.dtype](
        x.shape[1], row_of(x), x.data_ptr(), _address(residual), _address(weight), _address(bias), eps, relu,
        _address(y), mean, mean + row_bytes, mean + 2 * row_bytes, torch.get_num_threads(),
    )  # fmt: skip
    return stats


def _statistics(x: Tensor, eps: float) -> Tensor:
    return _run_train(to_batch_last(x), None, None, None, eps, False, None)


def _eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    x, residual, weight, bias = _as_kernels_read(x, residual, weight, bias)
    y, var = empty_batch_last(x.shape, dtype=x.dtype, device=x.device), var.contiguous()
    stats = x.new_empty(2, x.shape[1])
    stats[0] = mean
    _EVAL[x.dtype](
        x.shape[1], row_of(x), x.data_ptr(), _address(residual), _address(weight), _address(bias),
        stats.data_ptr(), var.data_ptr(), eps, relu, y.data_ptr(),
        stats.data_ptr() + stats.shape[1] * stats.element_size(), torch.get_num_threads(),
    )  # fmt: skip
    return y, stats


def _backward_in_place(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    through_statistics: bool,
    relu: bool,
    need_x: bool,
    need_affine: bool,
) -> Tensor:
    x, _, weight, bias = _as_kernels_read(x, None, weight, bias)
    row_bytes = x.shape[1] * dy.element_size()
    affine = dy.new_empty(2 if need_affine else 0, x.shape[1])
    dweight, rounded = affine.data_ptr() if need_affine else 0, x.dtype == torch.bfloat16
    _BACKWARD[dy.dtype](
        x.shape[1], row_of(x), dy.data_ptr(), x.data_ptr(), 0, rounded, _address(weight), _address(bias),
        stats.data_ptr(), stats.data_ptr() + row_bytes, through_statistics, relu, dy.data_ptr() if need_x else 0,
        0, dweight, dweight + row_bytes if need_affine else 0, torch.get_num_threads(),
    )  # fmt: skip
    return affine


def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    through_statistics: bool,
    relu: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, (x, z, weight, bias) = to_batch_last(dy), _as_kernels_read(x, z, weight, bias)
    channels, row_bytes = x.shape[1], x.shape[1] * dy.element_size()
    dx, affine, dresidual = _gradients(dy, need_x, need_affine, need_residual)
    dweight = affine.data_ptr() if need_affine else 0
    rounded = x.dtype == torch.bfloat16
    _BACKWARD[dy.dtype](
        channels, row_of(x), dy.data_ptr(), x.data_ptr(), _address(z), rounded, _address(weight), _address(bias),
        stats.data_ptr(), stats.data_ptr() + row_bytes, through_statistics, relu,
        dx.data_ptr() if need_x else 0, dresidual.data_ptr() if need_residual else 0, dweight,
        dweight + row_bytes if need_affine else 0, torch.get_num_threads(),
    )  # fmt: skip
    return dx, affine, dresidual


def _gradients(
    dy: Tensor, need_x: bool, need_affine: bool, need_residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised outputs of the backward op."""
    dx, dresidual = (
        empty_batch_last(dy.shape if need else (0, 0, 0, 0), dtype=dy.dtype, device=dy.device)
        for need in (need_x, need_residual)
    )
    return dx, dy.new_empty(2 if need_affine else 0, dy.shape[1]), dresidual


LIBRARY.impl("batch_norm_train", _train, "CPU")
LIBRARY.impl("batch_norm_statistics", _statistics, "CPU")
LIBRARY.impl("batch_norm_eval", _eval, "CPU")
LIBRARY.impl("batch_norm_backward", _backward, "CPU")
LIBRARY.impl("batch_norm_backward_", _backward_in_place, "CPU")


@torch.library.register_fake("fedpai::batch_norm_train", lib=LIBRARY)
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    return empty_batch_last(x.shape, dtype=x.dtype, device=x.device), x.new_empty(3, x.shape[1])


@torch.library.register_fake("fedpai::batch_norm_statistics", lib=LIBRARY)
def _(x: Tensor, eps: float) -> Tensor:
    return x.new_empty(3, x.shape[1])


@torch.library.register_fake("fedpai::batch_norm_eval", lib=LIBRARY)
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    return empty_batch_last(x.shape, dtype=x.dtype, device=x.device), x.new_empty(2, x.shape[1])


@torch.library.register_fake("fedpai::batch_norm_backward", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    through_statistics: bool,
    relu: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(dy, need_x, need_affine, need_residual)


@torch.library.register_fake("fedpai::batch_norm_backward_", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    through_statistics: bool,
    relu: bool,
    need_x: bool,
    need_affine: bool,
) -> Tensor:
    return dy.new_empty(2 if need_affine else 0, x.shape[1])


def given_statistics(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(2, C) stats of given statistics: the mean, and 1 / sqrt(var + eps) rounded as in the kernel."""
    stats, var = mean.new_empty(2, mean.shape[0]), var.contiguous()
    stats[0] = mean
    _EVAL[mean.dtype](
        mean.shape[0], 0, 0, 0, 0, 0, 0, var.data_ptr(), eps, False, 0,
        stats.data_ptr() + stats.shape[1] * stats.element_size(), 1,
    )  # fmt: skip
    return stats
