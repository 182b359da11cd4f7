# SPDX-License-Identifier: Apache-2.0
"""Sparse-weight linear layer: a convolution of 1 x 1 images, with the rows of x as the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import with_contiguous_gradient
from ..plan import Plan
from .conv2d import differentiable_conv2d
from .geometry import flatten, resolve_geometry
from .operands import MANY_CLIENTS, Backend, check_operands
from .stored import stores

GEOMETRY = flatten(resolve_geometry((1, 1), 1, 0, 1))
"""That of a linear layer, as a convolution's travels."""


def sparse_linear(
    x: Tensor,
    values: Tensor,
    plan: Plan,
    bias: Tensor | None = None,
    *,
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x @ plan.unpack(values).T + bias`` without ever forming the dense weight.

    Differentiable in x, values and bias, to any order; a weight outside the mask meets nothing, not even infinities,
    except between neighbouring features with nearly equal masks, as in :func:`fedpai_kernels.ops.sparse_conv2d`.
    Deterministic for a given number of threads. Several clients that share the plan may be computed at once, as there.

    Args:
        x: (..., in), float32 or float64, any strides. A 2-D x that is stored (in, N) is read fastest, rows without gaps
            nearly as fast. Of K clients: (K, ..., in); a 3-D x is read fastest when stored (K, in, N).
        values: (plan.nnz,), the surviving weights in row-major order of the mask. Of K clients: (K, plan.nnz).
        plan: of kind "linear".
        bias: (out,) or None. Of K clients: (K, out).
        activation_dtype: as in :func:`fedpai_kernels.ops.sparse_conv2d`.

    Returns:
        (..., out). For 2-D x stored (out, N). Of K clients: (K, ..., out), for 3-D x stored (K, out, N).

    Raises:
        TypeError: a wrong dtype, or operands that are not tensors.
        ValueError: shapes, devices or settings that do not fit, or numbers of clients that differ.
    """
    check_linear(x, values, plan, bias, MANY_CLIENTS)
    clients = values.dim() - 1  # dimensions
    rows = x.unsqueeze(-2) if x.dim() == clients + 1 else x.flatten(clients, -2)
    images = rows.unsqueeze(-1).unsqueeze(-1)
    if rows.is_contiguous() and rows.numel() > 0:
        images = with_contiguous_gradient(images)
    keeps = stores(x, activation_dtype)
    # Not by indices: their gradient is a tensor of zeros with one element of it set.
    y = differentiable_conv2d(images, values, bias, plan, GEOMETRY, keeps).squeeze(-1).squeeze(-1)
    return y if x.dim() == clients + 2 else y.reshape(*x.shape[:-1], plan.mask_shape[0])


def check_linear(x: Tensor, values: Tensor, plan: Plan, bias: Tensor | None, backend: Backend) -> None:
    """Every check of :func:`sparse_linear`.

    Raises:
        TypeError, ValueError: as it says, and whatever the backend raises about the device of x.
    """
    check_operands(x, values, plan, bias, backend)
    if plan.kind != "linear":
        raise ValueError(f"plan: expected one of kind 'linear', got kind {plan.kind!r} of shape {plan.mask_shape}")
    in_features = plan.mask_shape[1]
    if x.dim() < values.dim() or x.shape[-1] != in_features:
        clients = "" if values.dim() == 1 else "K, "
        raise ValueError(f"x: expected ({clients}..., {in_features}), got shape {tuple(x.shape)}")
