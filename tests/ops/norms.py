# SPDX-License-Identifier: Apache-2.0
"""Batch norm with and without a residual and a ReLU, in long double, in torch and by this package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.ops.norm import batch_norm

__all__ = ["check", "ours", "run", "upstream"]


def upstream(kind: str, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    if kind == "batch_last":
        return fk.to_batch_last(torch.randn(like.shape, dtype=like.dtype))
    if kind == "contiguous":
        return torch.randn(like.shape, dtype=like.dtype)
    if kind == "expanded":
        return torch.randn(1, c, 1, 1, dtype=like.dtype).expand(n, c, h, w)
    return torch.randn(n, 2 * c, h, w, dtype=like.dtype)[:, ::2]


Run = tuple[Tensor, ...]
NAMES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var", "dresidual")


def settings(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Running mean and variance, weight, bias; float32 numbers in any dtype."""
    draw = torch.Generator().manual_seed(1)
    mean, weight, bias = (torch.randn(channels, generator=draw).to(dtype) for _ in range(3))
    return mean, (torch.rand(channels, generator=draw) + 0.5).to(dtype), weight, bias


def run(
    f: Callable[..., Tensor], x: Tensor, dy: Tensor, training: bool, residual: Tensor | None = None
) -> Run:
    """f(x, running_mean, running_var, weight, bias, training[, residual=]), its gradients and the statistics
    after it.
    """
    x = x.detach().requires_grad_()
    given = {} if residual is None else {"residual": residual.detach().requires_grad_()}
    mean, var, weight, bias = settings(x.shape[1], x.dtype)
    weight.requires_grad_()
    bias.requires_grad_()
    y = f(x, mean, var, weight, bias, training, **given)
    y.backward(dy)
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return (
        y.detach(), x.grad, weight.grad, bias.grad, mean, var, *(r.grad for r in given.values())
    )  # fmt: skip


def exact(
    x: Tensor, dy: Tensor, training: bool, relu: bool, residual: Tensor | None = None
) -> list[np.ndarray]:
    """What `run` returns, in long double."""

    def wide(t: Tensor) -> np.ndarray:
        return t.detach().double().numpy().astype(np.longdouble)

    def per_channel(v: np.ndarray) -> np.ndarray:
        return v[:, None, None]

    mean, var, weight, bias = (wide(t) for t in settings(x.shape[1], x.dtype))
    a, g, axes = wide(x), wide(dy), (0, 2, 3)
    count = a.size // a.shape[1]
    running_mean, running_var = mean, var
    if training:
        mean = a.mean(axes)
        var = ((a - per_channel(mean)) ** 2).mean(axes)
        running_mean = 0.9 * running_mean + np.longdouble(0.1) * mean
        running_var = 0.9 * running_var + np.longdouble(0.1) * var * count / (count - 1)
    inverse = per_channel(1 / np.sqrt(var + np.longdouble(1e-5)))
    normed = (a - per_channel(mean)) * inverse
    y = normed * per_channel(weight) + per_channel(bias)
    if residual is not None:
        y = y + wide(residual)
    if relu:
        g, y = g * (y > 0), y * (y > 0)
    dweight, dbias = (g * normed).sum(axes), g.sum(axes)
    dx = g
    if training:
        dx = g - per_channel(dbias) / count - normed * per_channel(dweight) / count
    results = [y, dx * inverse * per_channel(weight), dweight, dbias, running_mean, running_var]
    return results if residual is None else [*results, g]


def ours(relu: bool) -> Callable[..., Tensor]:
    return lambda *args, **residual: batch_norm(*args, relu=relu, **residual)


def torchs(relu: bool) -> Callable[..., Tensor]:
    def f(*args: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.batch_norm(*args)
        if residual is not None:
            y = y + residual
        return torch.relu(y) if relu else y

    return f


def check(x: Tensor, dy: Tensor, training: bool, relu: bool, residual: Tensor | None = None) -> None:
    """max error <= 2 x torch's own in the same dtype (3 x for gradients) + a floor of 16 eps x magnitude."""
    reference = exact(x, dy, training, relu, residual)
    torch_run, our_run = (run(f(relu), x, dy, training, residual) for f in (torchs, ours))
    eps = torch.finfo(x.dtype).eps
    for name, r, t, o in zip(NAMES[: len(reference)], reference, torch_run, our_run, strict=True):
        factor = 3 if name.startswith("d") else 2
        scale = abs(r).max()
        if name == "running_mean":
            scale += float(x.abs().max())
        if name == "dx":  # a difference of terms of this size
            scale += float(dy.abs().max())
        limit = factor * abs(t.double().numpy() - r).max() + 16 * eps * scale
        error = abs(o.double().numpy() - r).max()
        assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"
    assert fk.is_batch_last(our_run[0])
    assert fk.is_batch_last(our_run[1])
