# SPDX-License-Identifier: Apache-2.0
"""Group norm of batch-last activations, with an optional ReLU in the same pass.

An image has statistics of its own in every group, so images are the lanes of the kernels and a group is walked as
rows of them. Forward reads the activation twice and writes once; backward reads gradient and activation twice and
writes once. The mean is subtracted before anything is squared. A result has the same bits on every run and at every
thread count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _C
from ..layout import empty_batch_last, to_batch_last
from .norm import check_operand
from .registry import LIBRARY, called_by_position, gradients_of_aliases
from .stored import refuse_graph, stored, stores, widened

__all__ = ["group_norm"]

_FORWARD = {torch.float32: _C.group_norm_forward_f32, torch.float64: _C.group_norm_forward_f64}
_BACKWARD = {torch.float32: _C.group_norm_backward_f32, torch.float64: _C.group_norm_backward_f64}

# ---- the ops: batch-last in and out
# -----------------------------------------------------------------------------

# stats: (2, groups, N) mean and 1 / sqrt(var + eps).
LIBRARY.define(
    "group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool relu) -> (Tensor, Tensor)"
)
# (dx, (2, C) gradients of weight and bias); what is not needed comes back with no elements. x may be float32 that was
# rounded to bfloat16.
LIBRARY.define(
    "group_norm_backward(Tensor dy, Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor stats, bool relu,"
    " bool need_x, bool need_affine) -> (Tensor, Tensor)"
)


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, h * w, groups


def _contiguous(t: Tensor | None) -> tuple[Tensor | None, int]:
    """`t` as the kernels read it, and its address."""
    t = None if t is None else t.contiguous()
    return t, 0 if t is None else t.data_ptr()


def _halves(t: Tensor) -> tuple[int, int]:
    """The addresses of both rows of a contiguous tensor of two, zeros where it has no elements."""
    return t.data_ptr(), t.data_ptr() + t.numel() // 2 * t.element_size()


def _outputs(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return empty_batch_last(x.shape, dtype=x.dtype, device=x.device), x.new_empty(2, groups, x.shape[0])


def _forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    x, (weight, weight_at), (bias, bias_at) = to_batch_last(x), _contiguous(weight), _contiguous(bias)
    y, stats = _outputs(x, groups)
    _FORWARD[x.dtype](
        *_sizes(x, groups), x.data_ptr(), weight_at, bias_at, eps, relu, y.data_ptr(),
        *_halves(stats), torch.get_num_threads(),
    )  # fmt: skip
    return y, stats


def _gradients(dy: Tensor, need_x: bool, need_affine: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs of the backward op."""
    dx = empty_batch_last(dy.shape if need_x else (0, 0, 0, 0), dtype=dy.dtype, device=dy.device)
    return dx, dy.new_empty(2 if need_affine else 0, dy.shape[1])


def _backward(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    relu: bool,
    need_x: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor]:
    dy, x = to_batch_last(dy), widened(to_batch_last(x))
    (weight, weight_at), (bias, bias_at) = _contiguous(weight), _contiguous(bias)
    dx, affine = _gradients(dy, need_x, need_affine)
    _BACKWARD[x.dtype](
        *_sizes(x, groups), dy.data_ptr(), x.data_ptr(), weight_at, bias_at, *_halves(stats), relu,
        dx.data_ptr() if need_x else 0, *_halves(affine), torch.get_num_threads(),
    )  # fmt: skip
    return dx, affine


LIBRARY.impl("group_norm", _forward, "CPU")
LIBRARY.impl("group_norm_backward", _backward, "CPU")


@torch.library.register_fake("fedpai::group_norm", lib=LIBRARY)
def _(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(x, groups)


@torch.library.register_fake("fedpai::group_norm_backward", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    relu: bool,
    need_x: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor]:
    return _gradients(dy, need_x, need_affine)


# ---- autograd
# ---------------------------------------------------------------------------------------------------


@called_by_position
class _GroupNorm(torch.autograd.Function):
    """(x, groups, weight, bias, eps, relu, stores) -> (y, stats)."""

    @staticmethod
    def forward(
        x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, stores: bool
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.fedpai.group_norm(x, groups, weight, bias, eps, relu)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.groups, weight, bias, ctx.eps, ctx.relu, stores = inputs
        if stores and any(ctx.needs_input_grad):
            x = stored(x)
        ctx.save_for_backward(x, weight, bias, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, weight, bias, stats = ctx.saved_tensors
        need_x, _, *need_affine = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            refuse_graph(x)

            def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return _twin(x, ctx.groups, weight, bias, ctx.eps, ctx.relu)

            dx, dweight, dbias = gradients_of_aliases(function, (x, weight, bias), (need_x, *need_affine), dy)
            return dx, None, dweight, dbias, None, None, None
        dx, affine = torch.ops.fedpai.group_norm_backward(
            dy, x, ctx.groups, weight, bias, stats, ctx.relu, need_x, any(need_affine)
        )
        return (
            dx if need_x else None,
            None,
            affine[0] if need_affine[0] else None,
            affine[1] if need_affine[1] else None,
            *(None,) * 3,
        )


def _twin(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """The same function in plain torch, for empty inputs and for gradients of gradients."""
    y = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    return torch.relu(y) if relu else y


# ---- checks
# -----------------------------------------------------------------------------------------------------


def _check(x: Tensor, num_groups: int, parameters: dict[str, Tensor | None]) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected a shape (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in _FORWARD:
        raise TypeError(f"x: expected dtype float32 or float64, got {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"x: expected a tensor on the CPU, got one on {x.device}")
    n, c, h, w = x.shape
    if num_groups < 1 or c % num_groups != 0:
        raise ValueError(f"num_groups: expected a divisor of the {c} channels of x, got {num_groups}")
    for name, p in parameters.items():
        check_operand(name, p, x, (c,), "one value per channel of x")
    if n * (c // num_groups) * h * w == 1:  # as torch has it
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = False,
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.group_norm` of a 4-D tensor, returned batch-last; with `relu`, followed by a ReLU.

    Args:
        x: (N, C, H, W), float32 or float64, on the CPU; batch-last is read as it is, other strides are converted.
        num_groups: of channels, each of which is normalised for itself in every image; divides C.
        weight, bias: (C,).
        eps: added to the variance.
        relu: y = max(y, 0) in the same pass.
        activation_dtype: `torch.bfloat16` keeps a float32 `x` for the gradient rounded
            (:mod:`fedpai_kernels.ops.stored`); None keeps it as it is. The statistics are those of `x`.

    Differentiable in `x`, `weight` and `bias`; gradients of gradients are left to torch.

    Raises:
        TypeError: a dtype other than the above, or parameters of another dtype than `x`.
        ValueError: another device or shape; groups that do not divide the channels; a single value to normalise,
        as in torch; what `activation_dtype` cannot be.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            group_norm, (x,), x, num_groups, weight, bias, eps, relu=relu, activation_dtype=activation_dtype
        )
    _check(x, num_groups, {"weight": weight, "bias": bias})
    keeps = stores(x, activation_dtype)
    if x.numel() == 0:
        return to_batch_last(_twin(x, num_groups, weight, bias, eps, relu))
    y: Tensor = _GroupNorm.apply(x, num_groups, weight, bias, eps, relu, keeps)[0]
    return y
