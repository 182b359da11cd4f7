# SPDX-License-Identifier: Apache-2.0
"""Batch norm of batch-last activations against torch's, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.ops.norm import Running, batch_norm
from tests.ops.norms import check, ours, run, upstream

SHAPES = {
    "n_is_1": (1, 3, 5, 5),
    "two_values_per_channel": (2, 1, 1, 1),
    "n_below_vector": (3, 5, 3, 4),
    "n_not_multiple": (65, 3, 9, 7),
    "one_channel": (16, 1, 8, 8),
    "whole_blocks": (64, 4, 8, 4),
    "rows_cut_among_threads": (64, 2, 40, 40),
}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("strides", [1, 2])
def test_running_statistics_take_the_batch_in_as_by_lerp(dtype: torch.dtype, momentum: float, strides: int) -> None:
    stats = torch.randn(3, 37, dtype=dtype)
    mean, var = (torch.randn(37 * strides, dtype=dtype)[::strides] for _ in range(2))
    expected = torch.lerp(mean, stats[0], momentum), torch.lerp(var, stats[2], momentum)
    versions = mean._version, var._version
    Running(mean, var, momentum).update(stats)
    assert torch.equal(mean, expected[0])
    assert torch.equal(var, expected[1])
    assert mean._version > versions[0]
    assert var._version > versions[1]
    alone = torch.zeros(37, dtype=dtype)
    Running(None, alone, momentum).update(stats)
    assert torch.equal(alone, torch.lerp(torch.zeros(37, dtype=dtype), stats[2], momentum))


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


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_create_graph_where_the_input_comes_from_the_same_weight(training: bool) -> None:
    x = fk.to_batch_last(torch.randn(3, 2, 2, 3, dtype=torch.float64)).requires_grad_()
    leaves = x, *(torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    statistics = (None, None) if training else (torch.zeros(2).double(), torch.ones(2).double())

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = batch_norm(x, *statistics, weight, bias, training)
        return batch_norm(h.tanh(), *statistics, weight, bias, training).tanh()

    expected = torch.autograd.grad(f(*leaves).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(f(*leaves).sum(), leaves, create_graph=True), expected)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_opcheck() -> None:
    x, dy = (fk.to_batch_last(torch.randn(5, 3, 4, 2)) for _ in range(2))
    weight, bias, mean, var = torch.randn(3), torch.randn(3), torch.zeros(3), torch.ones(3)
    ops: Any = torch.ops.fedpai
    for residual in (None, fk.to_batch_last(torch.randn_like(x)), torch.randn(5, 3, 4, 2)):
        z, stats = ops.batch_norm_train(x, residual, weight, bias, 1e-5, True)
        torch.library.opcheck(ops.batch_norm_train.default, (x, residual, weight, bias, 1e-5, True))
        torch.library.opcheck(
            ops.batch_norm_eval.default, (x, residual, weight, None, mean, var, 1e-5, False)
        )
    backward = ops.batch_norm_backward.default
    torch.library.opcheck(backward, (dy, x, None, weight, bias, stats, True, True, True, True, False))
    torch.library.opcheck(backward, (dy, x, None, None, None, stats, False, False, False, True, False))
    torch.library.opcheck(backward, (dy, x, z, weight, bias, stats, True, True, True, True, True))
    torch.library.opcheck(backward, (dy, x, z, None, None, stats, False, True, False, False, True))


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
