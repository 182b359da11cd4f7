# SPDX-License-Identifier: Apache-2.0
"""Batch norm of batch-last activations against torch's, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.ops.norm import batch_norm

SHAPES = {
    "n_is_1": (1, 3, 5, 5),
    "two_values_per_channel": (2, 1, 1, 1),
    "n_below_vector": (3, 5, 3, 4),
    "n_not_multiple": (65, 3, 9, 7),
    "one_channel": (16, 1, 8, 8),
    "whole_blocks": (64, 4, 8, 4),
    "rows_cut_among_threads": (64, 2, 40, 40),
}


def upstream(kind: str, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    if kind == "batch_last":
        return fk.to_batch_last(torch.randn(like.shape, dtype=like.dtype))
    if kind == "contiguous":
        return torch.randn(like.shape, dtype=like.dtype)
    if kind == "expanded":
        return torch.randn(1, c, 1, 1, dtype=like.dtype).expand(n, c, h, w)
    return torch.randn(n, 2 * c, h, w, dtype=like.dtype)[:, ::2]


Run = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
NAMES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")


def settings(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Running mean and variance, weight, bias; float32 numbers in any dtype."""
    draw = torch.Generator().manual_seed(1)
    mean, weight, bias = (torch.randn(channels, generator=draw).to(dtype) for _ in range(3))
    return mean, (torch.rand(channels, generator=draw) + 0.5).to(dtype), weight, bias


def run(f: Callable[..., Tensor], x: Tensor, dy: Tensor, training: bool) -> Run:
    """f(x, running_mean, running_var, weight, bias, training), its gradients and the statistics after it."""
    x = x.detach().requires_grad_()
    mean, var, weight, bias = settings(x.shape[1], x.dtype)
    weight.requires_grad_()
    bias.requires_grad_()
    y = f(x, mean, var, weight, bias, training)
    y.backward(dy)
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return y.detach(), x.grad, weight.grad, bias.grad, mean, var


def exact(x: Tensor, dy: Tensor, training: bool, relu: bool) -> list[np.ndarray]:
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
    if relu:
        g, y = g * (y > 0), y * (y > 0)
    dweight, dbias = (g * normed).sum(axes), g.sum(axes)
    dx = g
    if training:
        dx = g - per_channel(dbias) / count - normed * per_channel(dweight) / count
    return [y, dx * inverse * per_channel(weight), dweight, dbias, running_mean, running_var]


def ours(relu: bool) -> Callable[..., Tensor]:
    return lambda *args: batch_norm(*args, relu=relu)


def torchs(relu: bool) -> Callable[..., Tensor]:
    return lambda *args: torch.relu(F.batch_norm(*args)) if relu else F.batch_norm(*args)


def check(x: Tensor, dy: Tensor, training: bool, relu: bool) -> None:
    """max error <= 2 x torch's own in the same dtype (3 x for gradients) + a floor of 16 eps x magnitude."""
    reference = exact(x, dy, training, relu)
    torch_run, our_run = run(torchs(relu), x, dy, training), run(ours(relu), x, dy, training)
    eps = torch.finfo(x.dtype).eps
    for name, r, t, o in zip(NAMES, reference, torch_run, our_run, strict=True):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rounded(isa: str, shape: tuple[int, ...], training: bool, relu: bool, dtype: torch.dtype) -> None:
    x = fk.to_batch_last(torch.randn(shape, dtype=dtype) * 2 + 0.5)
    check(x, upstream("batch_last", x), training, relu)


@pytest.mark.parametrize("kind", ["contiguous", "expanded", "sliced"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_upstream_gradient_of_any_strides(isa: str, kind: str, relu: bool) -> None:
    x = fk.to_batch_last(torch.randn(9, 4, 5, 6))
    check(x, upstream(kind, x), True, relu)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_exact_eval(isa: str, relu: bool) -> None:
    """Integers and powers of two: every step is exact, so all bits must agree in every order of summation."""
    n, c, h, w = 13, 3, 7, 5
    x = fk.to_batch_last(torch.randint(-8, 9, (n, c, h, w)).float()).requires_grad_()
    dy = torch.randint(-4, 5, (n, c, h, w)).float()
    mean, var = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([4.0, 0.25, 1.0])
    weight, bias = (
        torch.tensor([2.0, -3.0, 5.0]).requires_grad_(),
        torch.tensor([1.0, 0.0, -7.0]).requires_grad_(),
    )
    y = batch_norm(x, mean, var, weight, bias, False, eps=0.0, relu=relu)
    y.backward(dy)
    normed = (x.detach() - mean.view(-1, 1, 1)) / var.sqrt().view(-1, 1, 1)
    expected = normed * weight.detach().view(-1, 1, 1) + bias.detach().view(-1, 1, 1)
    g = dy
    if relu:
        g, expected = dy * (expected > 0), expected.clamp(min=0)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, g * (weight.detach() / var.sqrt()).view(-1, 1, 1))
    assert torch.equal(weight.grad, (g * normed).sum((0, 2, 3)))
    assert torch.equal(bias.grad, g.sum((0, 2, 3)))


def test_exact_train(isa: str) -> None:
    """Half -1, half 1: mean 0, variance 1, and with eps = 3 a scale of one half; counts are powers of two."""
    n, c, h, w = 8, 3, 16, 32
    signs = torch.tensor([-1.0, 1.0]).repeat(n * h * w // 2)
    x = torch.stack([signs[torch.randperm(n * h * w)].view(n, h, w) for _ in range(c)], 1)
    x = fk.to_batch_last(x).requires_grad_()
    dy = torch.randint(-4, 5, x.shape).float()
    mean, var = torch.ones(c), torch.ones(c)
    y = batch_norm(x, mean, var, None, None, True, momentum=0.5, eps=3.0)
    y.backward(dy)
    assert torch.equal(y, x.detach() / 2)
    assert torch.equal(mean, torch.full((c,), 0.5))
    count = n * h * w
    torch.testing.assert_close(var, torch.full((c,), 0.5 + 0.5 * count / (count - 1)), rtol=1e-7, atol=0)
    d = x.detach()
    slope = (dy * d).sum((0, 2, 3), keepdim=True) / count / 4
    assert torch.equal(x.grad, (dy - dy.mean((0, 2, 3), keepdim=True) - d * slope) / 2)


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_a_mean_far_from_zero_does_not_cancel(isa: str, offset: float) -> None:
    x = fk.to_batch_last(torch.randn(32, 3, 12, 12) + offset)
    check(x, upstream("batch_last", x), True, False)
    variance = batch_norm_variance(x)
    exact = x.double().var((0, 2, 3))
    assert ((variance.double() - exact).abs() / exact).max() < 1e-6


def batch_norm_variance(x: Tensor) -> Tensor:
    var = torch.zeros(x.shape[1], dtype=x.dtype)
    batch_norm(x, None, var, None, None, True, momentum=1.0)
    return var


@pytest.mark.parametrize("shape", [(64, 2, 40, 40), (64, 64, 8, 8), (7, 3, 65, 33)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_bits_do_not_depend_on_the_number_of_threads(
    set_threads: Callable[[int], None], shape: tuple[int, ...], training: bool
) -> None:
    x, dy = fk.to_batch_last(torch.randn(shape)), fk.to_batch_last(torch.randn(shape))
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(run(ours(True), x, dy, training))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinity_stay_in_their_channel(isa: str) -> None:
    x = torch.randn(5, 3, 4, 4)
    x[2, 1, 3, 0] = float("nan")
    y = batch_norm(x, None, None, None, None, True, relu=True)
    assert y[:, 1].isnan().all()
    assert torch.isfinite(y[:, [0, 2]]).all()


@pytest.mark.parametrize("given", ["none", "weight", "bias"])
def test_parameters_may_be_absent_one_by_one(given: str) -> None:
    x = torch.randn(6, 3, 4, 4)
    weight = torch.randn(3) if given == "weight" else None
    bias = torch.randn(3) if given == "bias" else None
    torch.testing.assert_close(
        batch_norm(x, None, None, weight, bias, True), F.batch_norm(x, None, None, weight, bias, True)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_layouts_are_converted(layout: torch.memory_format) -> None:
    x = torch.randn(6, 3, 4, 5).to(memory_format=layout)
    y = batch_norm(x, None, None, None, None, True)
    assert fk.is_batch_last(y)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, None, None, True))


def test_gradients_that_are_not_wanted_are_not_computed() -> None:
    x, weight = torch.randn(4, 2, 3, 3), torch.randn(2, requires_grad=True)
    batch_norm(x, None, None, weight, None, True).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    x.requires_grad_()
    fixed = weight.detach()
    batch_norm(x, torch.zeros(2), torch.ones(2), fixed, None, False).sum().backward()
    torch.testing.assert_close(x.grad, (fixed / (1 + 1e-5) ** 0.5).view(1, 2, 1, 1).expand_as(x))


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck_twice(training: bool, relu: bool) -> None:
    x = fk.to_batch_last(torch.randn(3, 2, 2, 3, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = (None, None) if training else (mean, var)
        return batch_norm(x, *statistics, weight, bias, training, relu=relu)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


def test_opcheck() -> None:
    x, dy = (fk.to_batch_last(torch.randn(5, 3, 4, 2)) for _ in range(2))
    weight, bias, mean, var = torch.randn(3), torch.randn(3), torch.zeros(3), torch.ones(3)
    ops: Any = torch.ops.fedpai
    _, stats = ops.batch_norm_train(x, weight, bias, 1e-5, True)
    torch.library.opcheck(ops.batch_norm_train.default, (x, weight, bias, 1e-5, True))
    torch.library.opcheck(ops.batch_norm_eval.default, (x, weight, None, mean, var, 1e-5, False))
    torch.library.opcheck(
        ops.batch_norm_backward.default, (dy, x, weight, bias, stats, True, True, True, True)
    )
    torch.library.opcheck(
        ops.batch_norm_backward.default, (dy, x, None, None, stats, False, False, False, True)
    )


def test_an_empty_batch_changes_no_statistics() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    y = batch_norm(torch.zeros(0, 3, 4, 4), mean, var, None, None, True)
    assert y.shape == (0, 3, 4, 4)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3, 4),), ValueError, r"x: expected a shape \(N, C, H, W\)"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16),), TypeError, "bfloat16"),
        (
            (torch.zeros(2, 3, 4, 4), torch.zeros(4), torch.ones(3)),
            ValueError,
            "running_mean: expected shape",
        ),
        (
            (torch.zeros(2, 3, 4, 4), None, None, torch.ones(3).double()),
            TypeError,
            "weight: expected the dtype",
        ),
        ((torch.zeros(2, 3, 4, 4),), ValueError, "both are needed when training is False"),
        (
            (torch.zeros(1, 3, 1, 1), None, None, None, None, True),
            ValueError,
            "more than 1 value per channel",
        ),
        ((torch.zeros(2, 3, 4, 4, device="meta"),), ValueError, "on the CPU"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_norm(*arguments)
