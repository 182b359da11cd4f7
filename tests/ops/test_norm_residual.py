# SPDX-License-Identifier: Apache-2.0
"""relu(batch_norm(x) + residual) in one pass, against torch's separate ones, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.ops.norm import batch_norm
from tests.ops.norms import check, ours, run, upstream
from tests.ops.test_norm import SHAPES

RELU = pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@RELU
@TRAINING
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rounded(isa: str, shape: tuple[int, ...], training: bool, relu: bool, dtype: torch.dtype) -> None:
    x, residual = (fk.to_batch_last(torch.randn(shape, dtype=dtype) * 2 + 0.5) for _ in range(2))
    check(x, upstream("batch_last", x), training, relu, residual)


@pytest.mark.parametrize("kind", ["contiguous", "expanded", "sliced"])
@RELU
def test_gradient_and_residual_of_any_strides(isa: str, kind: str, relu: bool) -> None:
    x = fk.to_batch_last(torch.randn(9, 4, 5, 6))
    check(x, upstream(kind, x), True, relu, upstream(kind, x))


@RELU
def test_exact_eval(isa: str, relu: bool) -> None:
    """Integers and powers of two: every step is exact, so all bits must agree in every order of summation."""
    x, residual, dy = (fk.to_batch_last(torch.randint(-8, 9, (13, 3, 7, 5)).float()) for _ in range(3))
    mean, var = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([4.0, 0.25, 1.0])
    weight, bias = torch.tensor([2.0, -3.0, 5.0]), torch.tensor([1.0, 0.0, -7.0])
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    z = batch_norm(x, mean, var, weight, bias, False, eps=0.0, relu=relu, residual=residual)
    z.backward(dy)
    with torch.no_grad():
        normed = (x - mean.view(-1, 1, 1)) / var.sqrt().view(-1, 1, 1)
        expected = normed * weight.view(-1, 1, 1) + bias.view(-1, 1, 1) + residual
        g = dy * (expected > 0) if relu else dy
        gradients = (
            g * (weight / var.sqrt()).view(-1, 1, 1), g, (g * normed).sum((0, 2, 3)), g.sum((0, 2, 3))
        )  # fmt: skip
    assert torch.equal(z, expected.clamp(min=0) if relu else expected)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_exact_train(isa: str) -> None:
    """Half -1, half 1: mean 0, variance 1, and with eps = 3 a scale of one half; counts are powers of two."""
    n, c, h, w = 8, 3, 16, 32
    signs = torch.tensor([-1.0, 1.0]).repeat(n * h * w // 2)
    x = fk.to_batch_last(torch.stack([signs[torch.randperm(n * h * w)].view(n, h, w) for _ in range(c)], 1))
    residual, dy = (fk.to_batch_last(torch.randint(-4, 5, x.shape).float()) for _ in range(2))
    x.requires_grad_()
    residual.requires_grad_()
    z = batch_norm(x, None, None, None, None, True, eps=3.0, relu=True, residual=residual)
    z.backward(dy)
    d = x.detach()
    before = d / 2 + residual.detach()
    g = dy * (before > 0)
    assert torch.equal(z, before.clamp(min=0))
    assert torch.equal(residual.grad, g)
    slope = (g * d).sum((0, 2, 3), keepdim=True) / (n * h * w) / 4
    assert torch.equal(x.grad, (g - g.mean((0, 2, 3), keepdim=True) - d * slope) / 2)


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "x residual", "x weight", "residual bias"])
@RELU
@TRAINING
def test_only_what_needs_a_gradient_gets_one(isa: str, wanted: str, relu: bool, training: bool) -> None:
    x, residual, dy = (fk.to_batch_last(torch.randn(5, 3, 8, 7)) for _ in range(3))
    weight, bias, mean, var = torch.randn(3), torch.randn(3), torch.randn(3), torch.rand(3) + 0.5

    def gradients(names: str) -> dict[str, Tensor | None]:
        given = {"x": x, "residual": residual, "weight": weight, "bias": bias}
        leaves = {k: t.clone().requires_grad_(k in names.split()) for k, t in given.items()}
        z = batch_norm(
            leaves["x"], mean.clone(), var.clone(), leaves["weight"], leaves["bias"], training, relu=relu,
            residual=leaves["residual"],
        )  # fmt: skip
        z.backward(dy)
        return {k: t.grad for k, t in leaves.items()}

    complete, some = gradients("x residual weight bias"), gradients(wanted)
    for name, gradient in some.items():
        if name in wanted.split():
            assert torch.equal(gradient, complete[name])
        else:
            assert gradient is None


def test_the_upstream_gradient_is_left_alone() -> None:
    x, residual, dy = (fk.to_batch_last(torch.randn(5, 3, 8, 7)) for _ in range(3))
    before = dy.clone()
    x.requires_grad_()
    batch_norm(x, None, None, None, None, True, relu=True, residual=residual).backward(dy)
    assert torch.equal(dy, before)


def test_the_same_tensor_as_input_and_residual() -> None:
    x = fk.to_batch_last(torch.randn(6, 3, 4, 4, dtype=torch.float64))
    dy = torch.randn_like(x)
    grads = []
    for f in (
        lambda t: batch_norm(t, None, None, None, None, True, relu=True, residual=t),
        lambda t: torch.relu(F.batch_norm(t, None, None, training=True) + t),
    ):
        leaf = x.clone().requires_grad_()
        f(leaf).backward(dy)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(64, 2, 40, 40), (64, 64, 8, 8), (7, 3, 65, 33)])
@TRAINING
def test_the_bits_do_not_depend_on_the_number_of_threads(
    set_threads: Callable[[int], None], shape: tuple[int, ...], training: bool
) -> None:
    x, residual, dy = (fk.to_batch_last(torch.randn(shape)) for _ in range(3))
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(run(ours(True), x, dy, training, residual))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@RELU
@TRAINING
def test_gradcheck_twice(training: bool, relu: bool) -> None:
    x, residual = (
        fk.to_batch_last(torch.randn(3, 2, 2, 3, dtype=torch.float64)).requires_grad_() for _ in range(2)
    )
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def f(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = (None, None) if training else (mean, var)
        return batch_norm(x, *statistics, weight, bias, training, relu=relu, residual=residual)

    assert torch.autograd.gradcheck(f, (x, residual, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, residual, weight, bias))
    fixed = x.detach()
    assert torch.autograd.gradgradcheck(
        lambda r: f(fixed, r, weight.detach(), bias.detach()) * r, (residual,)
    )


def test_the_residual_is_not_kept_for_the_gradient() -> None:
    x, residual = (fk.to_batch_last(torch.randn(4, 2, 3, 3)).requires_grad_() for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm(x, None, None, None, None, True, relu=True, residual=residual)
    assert all(t.data_ptr() != residual.data_ptr() for t in kept)
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_compiles() -> None:
    torch.compiler.reset()
    x, residual = (fk.to_batch_last(torch.randn(5, 3, 4, 4)) for _ in range(2))
    dy = torch.randn_like(x)

    def f(x: Tensor, residual: Tensor) -> Tensor:
        return batch_norm(x, None, None, None, None, True, relu=True, residual=residual) * 2

    results = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        a, b = x.clone().requires_grad_(), residual.clone().requires_grad_()
        z = call(a, b)
        z.backward(dy)
        results.append((z.detach(), a.grad, b.grad))
    torch.compiler.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_an_empty_batch() -> None:
    x = torch.zeros(0, 3, 4, 4)
    z = batch_norm(x, torch.zeros(3), torch.ones(3), None, None, True, relu=True, residual=x)
    assert z.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 1), ValueError, "residual: expected the shape of x"),
        (torch.zeros(2, 3, 4, 4).double(), TypeError, "residual: expected the dtype of x"),
        (torch.zeros(2, 3, 4, 4, device="meta"), ValueError, "residual: expected a tensor on the device"),
    ],
)
def test_errors(residual: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_norm(torch.zeros(2, 3, 4, 4), None, None, None, None, True, residual=residual)
