# SPDX-License-Identifier: Apache-2.0
"""The registered ops of batch norm, and their fake versions. Their arguments are checked in
:mod:`fedpai_kernels.ops.norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..layout import empty_batch_last, to_batch_last
from .registry import LIBRARY, Operation

_TRAIN = {torch.float32: _C.batch_norm_train_f32, torch.float64: _C.batch_norm_train_f64}
_EVAL = {torch.float32: _C.batch_norm_eval_f32, torch.float64: _C.batch_norm_eval_f64}
_BACKWARD = {torch.float32: _C.batch_norm_backward_f32, torch.float64: _C.batch_norm_backward_f64}

DTYPES = {"cpu": tuple(_TRAIN), "cuda": (torch.float32, torch.bfloat16)}
"""Of activations, by the type of their device. Parameters and statistics of bfloat16 ones are float32."""


def parameter_dtype(x: Tensor) -> torch.dtype:
    """Of the parameters and statistics of `x`, and of their gradients."""
    return torch.float32 if x.dtype == torch.bfloat16 else x.dtype

# ---- the ops: batch-last in and out
# -----------------------------------------------------------------------------

# stats: (3, C) mean, 1 / sqrt(var + eps), unbiased variance; of given statistics (2, C), without the last.
LIBRARY.define(
    "batch_norm_train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, int activation,"
    " float slope=0.0) -> (Tensor, Tensor)"
)
# On CUDA devices: the same, and statistics that exist take the batch's in, in the same launch.
LIBRARY.define(
    "batch_norm_train_running(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float momentum, float eps, int activation, float slope=0.0) -> (Tensor, Tensor)"
)
# The stats of x alone, and those of given statistics alone, rounded as in the kernels.
LIBRARY.define("batch_norm_statistics(Tensor x, float eps) -> Tensor")
LIBRARY.define("batch_norm_given_statistics(Tensor mean, Tensor var, float eps) -> Tensor")
LIBRARY.define(
    "batch_norm_eval(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
    " float eps, int activation, float slope=0.0) -> (Tensor, Tensor)"
)
# x and z may be float32 that was rounded to bfloat16 (both, or neither).
# (dx, (2, C) gradients of weight and bias, gradient of the residual); what is not needed comes back with no
# elements. z: where the forward op had a residual and an activation, what it returned, or the residual itself where
# the activation is smooth; only then is the residual's gradient another tensor than dy, and need_residual allowed.
LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? z, Tensor? weight, Tensor? bias, Tensor stats,"
    " bool through_statistics, int activation, bool need_x, bool need_affine, bool need_residual,"
    " float slope=0.0) -> (Tensor, Tensor, Tensor)"
)
# Without a residual; dy, batch-last, becomes dx where that is needed. Returns the gradients of weight and bias.
LIBRARY.define(
    "batch_norm_backward_(Tensor(a!) dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats,"
    " bool through_statistics, int activation, bool need_x, bool need_affine, float slope=0.0) -> Tensor"
)
# x for the backward ops, as bfloat16 with the derivatives of a piecewise linear activation; without stats it is z.
LIBRARY.define(
    "round_for_norm_backward(Tensor x, Tensor? weight, Tensor? bias, Tensor? stats, int activation, float slope=0.0)"
    " -> Tensor"
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
    `other` is the residual, or in the backward op the result or the residual."""
    return to_batch_last(x), _batch_last(other), _contiguous(weight), _contiguous(bias)


def _train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    x, residual, weight, bias = _as_kernels_read(x, residual, weight, bias)
    y = empty_batch_last(x.shape, dtype=x.dtype, device=x.device)
    return y, _run_train(x, residual, weight, bias, eps, activation, slope, y)


def _run_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    y: Tensor | None,
) -> Tensor:
    """The stats; y is written where there is one."""
    stats = x.new_empty(3, x.shape[1])
    mean, row_bytes = stats.data_ptr(), stats.shape[1] * stats.element_size()
    _TRAIN[x.dtype](
        x.shape[1], row_of(x), x.data_ptr(), _address(residual), _address(weight), _address(bias), eps, activation,
        slope, _address(y), mean, mean + row_bytes, mean + 2 * row_bytes, torch.get_num_threads(),
    )  # fmt: skip
    return stats


def _statistics(x: Tensor, eps: float) -> Tensor:
    return _run_train(to_batch_last(x), None, None, None, eps, 0, 0.0, None)


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
    x, residual, weight, bias = _as_kernels_read(x, residual, weight, bias)
    y, var = empty_batch_last(x.shape, dtype=x.dtype, device=x.device), var.contiguous()
    stats = x.new_empty(2, x.shape[1])
    stats[0] = mean
    _EVAL[x.dtype](
        x.shape[1], row_of(x), x.data_ptr(), _address(residual), _address(weight), _address(bias),
        stats.data_ptr(), var.data_ptr(), eps, activation, slope, y.data_ptr(),
        stats.data_ptr() + stats.shape[1] * stats.element_size(), torch.get_num_threads(),
    )  # fmt: skip
    return y, stats


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
    """The gradients of weight and bias; dx, which may be dy, and dresidual are written where they are."""
    x, z, weight, bias = _as_kernels_read(x, z, weight, bias)
    channels, row_bytes = x.shape[1], x.shape[1] * dy.element_size()
    affine = dy.new_empty(2 if need_affine else 0, channels)
    dweight = affine.data_ptr() if need_affine else 0
    _BACKWARD[dy.dtype](
        channels, row_of(x), dy.data_ptr(), x.data_ptr(), _address(z), x.dtype == torch.bfloat16, _address(weight),
        _address(bias), stats.data_ptr(), stats.data_ptr() + row_bytes, through_statistics, activation, slope,
        _address(dx), _address(dresidual), dweight, dweight + row_bytes if need_affine else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return affine


def backward_by(run: Callable[..., Tensor]) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """The two backward ops, into new gradients and into dy, of a device whose kernels `run` as `_run_backward` does."""

    def backward(
        dy: Tensor,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        through_statistics: bool,
        activation: int,
        need_x: bool,
        need_affine: bool,
        need_residual: bool,
        slope: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy = to_batch_last(dy)
        dx, dresidual = gradient_like(dy, need_x), gradient_like(dy, need_residual)
        norm = (x, z, weight, bias, stats, through_statistics, activation, slope)
        outputs = dx if need_x else None, dresidual if need_residual else None
        return dx, run(dy, *norm, *outputs, need_affine), dresidual

    def backward_in_place(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        through_statistics: bool,
        activation: int,
        need_x: bool,
        need_affine: bool,
        slope: float = 0.0,
    ) -> Tensor:
        norm = (x, None, weight, bias, stats, through_statistics, activation, slope)
        return run(dy, *norm, dy if need_x else None, None, need_affine)

    return backward, backward_in_place


_backward, _backward_in_place = backward_by(_run_backward)


def gradient_like(dy: Tensor, need: bool) -> Tensor:
    """An uninitialised gradient like dy, without elements where it is not needed."""
    return empty_batch_last(dy.shape if need else (0, 0, 0, 0), dtype=dy.dtype, device=dy.device)


def _round_for_backward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor | None, activation: int, slope: float = 0.0
) -> Tensor:
    x, _, weight, bias = _as_kernels_read(x, None, weight, bias)
    y = empty_batch_last(x.shape, dtype=torch.bfloat16, device=x.device)
    mean = _address(stats)
    invstd = mean + x.shape[1] * x.element_size() if mean else 0
    _C.round_for_backward(
        x.shape[1], row_of(x), x.data_ptr(), _address(weight), _address(bias), mean, invstd, activation, slope,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _given_statistics(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    stats, var = mean.new_empty(2, mean.shape[0]), var.contiguous()
    stats[0] = mean
    _EVAL[mean.dtype](
        mean.shape[0], 0, 0, 0, 0, 0, 0, var.data_ptr(), eps, 0, 0.0, 0,
        stats.data_ptr() + stats.shape[1] * stats.element_size(), 1,
    )  # fmt: skip
    return stats


LIBRARY.impl("batch_norm_train", _train, "CPU")
LIBRARY.impl("batch_norm_statistics", _statistics, "CPU")
LIBRARY.impl("batch_norm_given_statistics", _given_statistics, "CPU")
LIBRARY.impl("batch_norm_eval", _eval, "CPU")
LIBRARY.impl("batch_norm_backward", _backward, "CPU")
LIBRARY.impl("batch_norm_backward_", _backward_in_place, "CPU")
LIBRARY.impl("round_for_norm_backward", _round_for_backward, "CPU")

batch_norm_train = Operation("batch_norm_train", _train)
batch_norm_statistics = Operation("batch_norm_statistics", _statistics)
given_statistics = Operation("batch_norm_given_statistics", _given_statistics)
batch_norm_eval = Operation("batch_norm_eval", _eval)
batch_norm_backward = Operation("batch_norm_backward", _backward)
batch_norm_backward_ = Operation("batch_norm_backward_", _backward_in_place)


def _stats_fake(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, x.shape[1], dtype=parameter_dtype(x))


def _forward_fake(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return empty_batch_last(x.shape, dtype=x.dtype, device=x.device), _stats_fake(x, rows)


@torch.library.register_fake("fedpai::batch_norm_train", lib=LIBRARY)
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return _forward_fake(x, 3)


@torch.library.register_fake("fedpai::batch_norm_train_running", lib=LIBRARY)
def _(
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
    return _forward_fake(x, 3)


@torch.library.register_fake("fedpai::batch_norm_statistics", lib=LIBRARY)
def _(x: Tensor, eps: float) -> Tensor:
    return _stats_fake(x, 3)


@torch.library.register_fake("fedpai::batch_norm_given_statistics", lib=LIBRARY)
def _(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return mean.new_empty(2, mean.shape[0])


@torch.library.register_fake("fedpai::batch_norm_eval", lib=LIBRARY)
def _(
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
    return _forward_fake(x, 2)


@torch.library.register_fake("fedpai::batch_norm_backward", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    through_statistics: bool,
    activation: int,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_like(dy, need_x), _stats_fake(dy, 2 if need_affine else 0), gradient_like(dy, need_residual)


@torch.library.register_fake("fedpai::batch_norm_backward_", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    through_statistics: bool,
    activation: int,
    need_x: bool,
    need_affine: bool,
    slope: float = 0.0,
) -> Tensor:
    return _stats_fake(dy, 2 if need_affine else 0)


@torch.library.register_fake("fedpai::round_for_norm_backward", lib=LIBRARY)
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor | None, activation: int, slope: float = 0.0
) -> Tensor:
    return empty_batch_last(x.shape, dtype=torch.bfloat16, device=x.device)
