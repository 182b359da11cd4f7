# SPDX-License-Identifier: Apache-2.0
"""Batch norm of batch-last activations, with an optional residual and an optional activation in the same pass.

Forward reads the activation twice (the second time from cache) and writes once; backward reads gradient and
activation twice and writes once. A residual adds its own read, and the write of its gradient. The mean is
subtracted before anything is squared. A result has the same bits on every run and at every thread count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _C
from ..layout import to_batch_last
from .activation import Activation, chosen, in_torch, is_smooth, slope_at_result
from .norm_kernels import (
    DTYPES,
    batch_norm_backward,
    batch_norm_eval,
    batch_norm_train,
    parameter_dtype,
    row_of,
)
from .registry import called_by_position, gradients_of_aliases, is_watched_by_torch
from .stored import refuse_graph, stored, stores

__all__ = ["batch_norm"]

_UPDATE = {torch.float32: _C.update_running_f32, torch.float64: _C.update_running_f64}

# ---- autograd
# ---------------------------------------------------------------------------------------------------


class Running(NamedTuple):
    """The statistics that take a batch in."""

    mean: Tensor | None
    var: Tensor | None
    momentum: float

    def kept(self) -> list[Tensor]:
        return [t for t in (self.mean, self.var) if t is not None]

    def is_plain(self) -> bool:
        """Whether kernels may write the statistics as they lie, and nobody looks on."""
        return not is_watched_by_torch() and all(type(t) is Tensor and t.is_contiguous() for t in self.kept())

    def update(self, stats: Tensor) -> None:
        running = self.kept()
        if stats.is_cpu and type(stats) is Tensor and stats.is_contiguous() and self.is_plain():
            # Four small operations of torch's otherwise, as expensive as a small layer.
            channels, row_bytes = stats.shape[1], stats.shape[1] * stats.element_size()
            for t, row in ((self.mean, 0), (self.var, 2)):
                if t is not None:
                    _UPDATE[t.dtype](channels, self.momentum, stats.data_ptr() + row * row_bytes, t.data_ptr())
            torch.autograd.graph.increment_version(running)
            return
        with torch.no_grad():
            if self.mean is not None:
                self.mean.lerp_(stats[0], self.momentum)
            if self.var is not None:
                self.var.lerp_(stats[2], self.momentum)

    def train(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *activation: Any
    ) -> tuple[Tensor, Tensor]:
        """`batch_norm_train`, whose statistics are taken in. `activation`: eps, code and slope."""
        if not (x.is_cuda and self.is_plain()):
            result = batch_norm_train(x, residual, weight, bias, *activation)
            self.update(result[1])
            return result
        # In the same launch there.
        y, stats = torch.ops.fedpai.batch_norm_train_running(
            x, residual, weight, bias, self.mean, self.var, self.momentum, *activation
        )
        torch.autograd.graph.increment_version(self.kept())
        return y, stats


@called_by_position
class _BatchNorm(torch.autograd.Function):
    """(x, residual | None, weight, bias, mean | None, var | None, eps, code and slope of the activation,
    running | None, stores) -> (y, stats);
    given mean and var are constants. The running statistics are updated before anything is saved: a recomputation
    by `torch.utils.checkpoint` may stop there, and torch's batch norm has updated them by then.
    """

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        code: int,
        slope: float,
        running: Running | None,
        stores: bool,
    ) -> tuple[Tensor, Tensor]:
        if mean is not None and var is not None:
            return batch_norm_eval(x, residual, weight, bias, mean, var, eps, code, slope)
        if running is not None:
            return running.train(x, residual, weight, bias, eps, code, slope)
        return batch_norm_train(x, residual, weight, bias, eps, code, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, residual, weight, bias, mean, _, ctx.eps, ctx.code, ctx.slope, _, stores = inputs
        # With a residual, the gradient is read from the result and the residual itself is not kept, unless the
        # activation is smooth.
        z = None
        if residual is not None and ctx.code:
            z = residual if is_smooth(ctx.code) else output[0]
        if stores and any(ctx.needs_input_grad):
            if z is None:
                x = stored_for(x, weight, bias, output[1], ctx.code, ctx.slope)
            else:
                x, z = stored(x), stored_for(z, None, None, None, ctx.code, ctx.slope)
        ctx.save_for_backward(x, z, weight, bias, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.through_statistics = mean is None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 11
        x, z, weight, bias, stats = ctx.saved_tensors
        need_x, need_residual, *need_affine = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            refuse_graph(x)
            given = None if ctx.through_statistics else stats
            smooth = z is not None and is_smooth(ctx.code)
            g = dy if z is None or smooth else dy * slope_at_result(z.detach(), ctx.code, ctx.slope)
            before_sum = ctx.code if z is None else 0

            def function(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
                y = twin(x, weight, bias, given, ctx.eps, before_sum, ctx.slope)
                return y if residual is None else in_torch(y + residual, ctx.code, ctx.slope)

            tensors, needs = (x, weight, bias, z if smooth else None), (need_x, *need_affine, need_residual and smooth)
            dx, dweight, dbias, dz = gradients_of_aliases(function, tensors, needs, g)
            if need_residual and not smooth:
                dz = g
            return (dx, dz, dweight, dbias, *(None,) * 7)
        dx, affine, dresidual = batch_norm_backward(
            dy, x, z, weight, bias, stats, ctx.through_statistics, ctx.code, need_x, any(need_affine),
            need_residual and z is not None, ctx.slope,
        )  # fmt: skip
        if z is None:
            dresidual = dy
        return (
            dx if need_x else None,
            dresidual if need_residual else None,
            affine[0] if need_affine[0] else None,
            affine[1] if need_affine[1] else None,
            *(None,) * 7,
        )


def stored_for(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor | None, code: int, slope: float
) -> Tensor:
    """The copy of a norm's input, or without `stats` of its result, from which the backward pass has the derivatives
    of a piecewise linear activation: rounding takes no element across a threshold. Somebody else's copy may.
    """
    if code == 0 or is_smooth(code):
        return stored(x)
    norm = weight, bias, stats, code, slope
    return stored(x, lambda dense: torch.ops.fedpai.round_for_norm_backward(dense, *norm))


def twin(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor | None, eps: float, code: int, slope: float
) -> Tensor:
    """The same function in plain torch, without a residual, for gradients of gradients."""
    if stats is None:
        y = torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    else:
        mean, invstd = stats[:, None, :, None, None]
        y = (x - mean) * invstd
        if weight is not None:
            y = y * weight[:, None, None]
        if bias is not None:
            y = y + bias[:, None, None]
    return in_torch(y.to(x.dtype), code, slope)


# ---- checks
# -----------------------------------------------------------------------------------------------------


def check_operand(
    name: str, t: Tensor | None, x: Tensor, shape: tuple[int, ...], why: str, dtype: torch.dtype | None = None
) -> None:
    """That an operand beside `x`, if there is one, has `shape`, the device of `x`, and its dtype or `dtype`."""
    if t is None:
        return
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, {why}, got {tuple(t.shape)}")
    if t.dtype != (x.dtype if dtype is None else dtype):
        expected = f"the dtype of x, {x.dtype}" if dtype in (None, x.dtype) else f"{dtype} with an x of {x.dtype}"
        raise TypeError(f"{name}: expected {expected}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected a tensor on the device of x, {x.device}, got one on {t.device}")


def _check(x: Tensor, residual: Tensor | None, parameters: dict[str, Tensor | None]) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected a shape (N, C, H, W), got {tuple(x.shape)}")
    dtypes = DTYPES.get(x.device.type, DTYPES["cpu"])
    if x.dtype not in dtypes:
        raise TypeError(f"x: expected dtype {' or '.join(str(d)[6:] for d in dtypes)}, got {x.dtype}")
    if x.device.type not in DTYPES:
        raise ValueError(f"x: expected a tensor on the CPU or a CUDA device, got one on {x.device}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_operand("residual", residual, x, x.shape, "that of x")
    for name, p in parameters.items():
        check_operand(name, p, x, (x.shape[1],), "one value per channel of x", parameter_dtype(x))


def check_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    residual: Tensor | None = None,
) -> None:
    """Every check of :func:`batch_norm`."""
    _check(
        x,
        residual,
        {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias},
    )
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean, running_var: both are needed when training is False")
    if training and row_of(x) == 1 and x.shape[1] > 0:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of a 4-D tensor, returned batch-last; with `residual`, plus that; with
    `relu` or another `activation`, followed by that: ``relu(batch_norm(x) + residual)``.

    Args:
        x: (N, C, H, W), float32 or float64 on the CPU, float32 or bfloat16 on a CUDA device; batch-last is read as
        it is, other strides are converted. Parameters and statistics of a bfloat16 `x` are float32.
        running_mean, running_var: (C,). Normalised with when not `training`; updated in place when
        `training`.
        weight, bias: (C,).
        training: whether to normalise with the statistics of `x`.
        momentum: share of the new statistics in the update of the running ones (the variance enters
        unbiased).
        eps: added to the variance.
        relu: y = max(y, 0) in the same pass.
        residual: (N, C, H, W), added before the activation in the same pass. With a ReLU too, the result is kept
        for the gradient, as by `torch.relu`, and changing it in place is an error then; so it is with ReLU6 and a
        leaky ReLU. With SiLU and GELU `residual` is kept instead.
        activation: another one in place of the ReLU: "relu", "relu6", "silu", "gelu", "gelu_tanh" or
        ``Activation("leaky_relu", slope)``. The smooth ones are within a few ulp of the exact function, the others
        have torch's bits.
        activation_dtype: `torch.bfloat16` keeps a float32 `x`, and that result or residual, for the gradient
        rounded (:mod:`fedpai_kernels.ops.stored`); None keeps them as they are. The statistics are those of `x`.

    Differentiable in `x`, `residual`, `weight` and `bias`; gradients of gradients are left to torch. An empty
    `x` changes no statistics.

    Raises:
        TypeError: a dtype other than the above, or parameters or a residual of one that does not go with it.
        ValueError: another device or shape; one value per channel in training; no statistics to evaluate
        with; `relu` and `activation`, or one that is unknown; what `activation_dtype` cannot be.
        CudaUnavailableError: an `x` on a CUDA device without CUDA kernels or a driver (docs/gpu.md).
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            batch_norm, (x,), x, running_mean, running_var, weight, bias, training, momentum, eps, relu=relu,
            residual=residual, activation=activation, activation_dtype=activation_dtype,
        )  # fmt: skip
    applied = chosen(relu, activation)
    code, slope = applied.code, applied.slope
    check_norm(x, running_mean, running_var, weight, bias, training, residual)
    keeps = stores(x, activation_dtype)
    if x.numel() == 0:
        y = torch.nn.functional.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps
        )
        if residual is not None:
            y = y + residual
        return to_batch_last(in_torch(y, code, slope))
    if not training:
        statistics = running_mean, running_var
        out: Tensor = _BatchNorm.apply(x, residual, weight, bias, *statistics, eps, code, slope, None, keeps)[0]
        return out
    running = Running(running_mean, running_var, momentum)
    compiling = torch.compiler.is_compiling()  # which takes tensors as arguments only, and stops nowhere
    arguments = x, residual, weight, bias, None, None, eps, code, slope, None if compiling else running, keeps
    y, stats = _BatchNorm.apply(*arguments)
    if compiling:
        running.update(stats)
    return y
