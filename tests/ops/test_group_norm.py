# SPDX-License-Identifier: Apache-2.0
"""Group norm of batch-last activations against torch's, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.ops.group_norm import group_norm
from tests.ops.norms import upstream

# (shape, groups)
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "n_is_1": ((1, 6, 5, 5), 3),
    "one_group": ((5, 6, 4, 3), 1),
    "a_group_per_channel": ((9, 6, 4, 3), 6),
    "images_of_one_pixel": ((12, 8, 1, 1), 2),
    "channels_prime": ((3, 7, 5, 2), 7),
    "n_not_multiple": ((65, 4, 9, 7), 2),
    "several_strips": ((131, 4, 3, 3), 2),
    "whole_vectors": ((64, 32, 8, 4), 32),
    "group_cut_among_threads": ((64, 2, 40, 40), 1),
    "many_channels_in_a_piece": ((20, 96, 3, 3), 1),
}
EVERY_SHAPE = pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES.keys())
NAMES = ("y", "dx", "dweight", "dbias")


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias; float32 numbers in any dtype."""
    draw = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(channels, generator=draw).to(dtype) for _ in range(2))
    return weight, bias


def run(f: Callable[..., Tensor], x: Tensor, groups: int, dy: Tensor, affine: bool = True) -> list[Tensor]:
    """f(x, groups, weight, bias) and its gradients."""
    leaves = [x.detach().requires_grad_()]
    if affine:
        leaves += [p.requires_grad_() for p in parameters(x.shape[1], x.dtype)]
    y = f(leaves[0], groups, *leaves[1:])
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def ours(relu: bool) -> Callable[..., Tensor]:
    return lambda *args: group_norm(*args, relu=relu)


def torchs(relu: bool) -> Callable[..., Tensor]:
    return lambda *args: torch.relu(F.group_norm(*args)) if relu else F.group_norm(*args)


def exact(
    x: Tensor, groups: int, dy: Tensor, relu: bool, affine: bool
) -> tuple[list[np.ndarray], np.longdouble]:
    """What `run` returns, in long double; and the largest factor that a deviation is multiplied with."""

    def wide(t: Tensor) -> np.ndarray:
        return t.detach().double().numpy().astype(np.longdouble)

    shape = x.shape
    weight, bias = (wide(p)[:, None, None] for p in parameters(shape[1], x.dtype))
    if not affine:
        weight, bias = np.ones_like(weight), np.zeros_like(bias)
    a, g = wide(x).reshape(shape[0], groups, -1), wide(dy)
    mean = a.mean(2, keepdims=True)
    inverse = 1 / np.sqrt(((a - mean) ** 2).mean(2, keepdims=True) + np.longdouble(1e-5))
    normed = (a - mean) * inverse
    y = normed.reshape(shape) * weight + bias
    if relu:
        g, y = g * (y > 0), y * (y > 0)
    weighted = (g * weight).reshape(a.shape)
    pull = weighted.mean(2, keepdims=True) + normed * (weighted * normed).mean(2, keepdims=True)
    results = [y, ((weighted - pull) * inverse).reshape(shape)]
    if affine:
        results += [(g * normed.reshape(shape)).sum((0, 2, 3)), g.sum((0, 2, 3))]
    return results, max(inverse.max(), np.longdouble(1))


def check(x: Tensor, groups: int, dy: Tensor, relu: bool, affine: bool = True) -> None:
    """max error <= 2 x torch's own in the same dtype (3 x for gradients) + a floor of 16 eps x the size of the terms
    that were added up."""
    reference, steepest = exact(x, groups, dy, relu, affine)
    torch_run, our_run = (run(f(relu), x, groups, dy, affine) for f in (torchs, ours))
    eps, largest = torch.finfo(x.dtype).eps, {"y": float(x.abs().max()), "dx": float(dy.abs().max())}
    for name, r, t, o in zip(NAMES, reference, torch_run, our_run, strict=False):
        factor = 3 if name.startswith("d") else 2
        scale = abs(r).max() + steepest * largest.get(name, 0.0)
        limit = factor * abs(t.double().numpy() - r).max() + 16 * eps * scale
        error = abs(o.double().numpy() - r).max()
        assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"
    assert fk.is_batch_last(our_run[0])
    assert fk.is_batch_last(our_run[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@EVERY_SHAPE
def test_rounded(isa: str, shape: tuple[int, ...], groups: int, relu: bool, dtype: torch.dtype) -> None:
    x = fk.to_batch_last(torch.randn(shape, dtype=dtype) * 2 + 0.5)
    check(x, groups, upstream("batch_last", x), relu)
    check(x, groups, upstream("batch_last", x), relu, affine=False)


@pytest.mark.parametrize("kind", ["contiguous", "expanded", "sliced"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_upstream_gradient_of_any_strides(isa: str, kind: str, relu: bool) -> None:
    x = fk.to_batch_last(torch.randn(9, 4, 5, 6))
    check(x, 2, upstream(kind, x), relu)


# Multiples of 1/64, so that no two values of a small group differ by next to nothing.
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(1, 70), groups=st.integers(1, 4), channels_per_group=st.integers(1, 5), h=st.integers(1, 9),
    w=st.integers(1, 9), relu=st.booleans(), affine=st.booleans(), double=st.booleans(),
    kind=st.sampled_from(["batch_last", "contiguous", "sliced"]),
)  # fmt: skip
def test_any_shape(
    isa: str, n: int, groups: int, channels_per_group: int, h: int, w: int, relu: bool, affine: bool, double: bool,
    kind: str,
) -> None:  # fmt: skip
    if n * channels_per_group * h * w == 1:
        return
    shape, dtype = (n, groups * channels_per_group, h, w), torch.float64 if double else torch.float32
    x = fk.to_batch_last(torch.randint(-256, 257, shape).to(dtype) / 64)
    check(x, groups, upstream(kind, x), relu, affine)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("n", [1, 5, 16, 37, 70])
def test_exact(isa: str, n: int, relu: bool) -> None:
    """Half -1, half 1 in every image's group: mean 0, variance 1, and with eps = 3 a scale of one half; counts are
    powers of two. Every step is exact, so all bits must agree in every order of summation."""
    groups, per_group, h, w = 3, 2, 8, 16
    half = torch.tensor([-1.0, 1.0]).repeat(per_group * h * w // 2)
    x = torch.stack([half[torch.randperm(half.numel())] for _ in range(n * groups)])
    x = fk.to_batch_last(x.view(n, groups * per_group, h, w)).requires_grad_()
    dy = torch.randint(-4, 5, x.shape).float()
    weight = torch.tensor([2.0, -4.0, 6.0, 1.0, -2.0, 8.0]).requires_grad_()
    bias = torch.tensor([1.0, 0.0, -7.0, 2.0, 5.0, -1.0]).requires_grad_()
    y = group_norm(x, groups, weight, bias, eps=3.0, relu=relu)
    y.backward(dy)

    d, per_channel = x.detach(), weight.detach().view(-1, 1, 1)
    expected, g = d / 2 * per_channel + bias.detach().view(-1, 1, 1), dy
    if relu:
        expected, g = expected.clamp(min=0), dy * (expected > 0)
    assert torch.equal(y, expected)
    a, weighted = d.reshape(n, groups, -1), (g * per_channel).reshape(n, groups, -1)
    pull = weighted.mean(2, keepdim=True) + a * (weighted * a).mean(2, keepdim=True) / 4
    assert torch.equal(x.grad, ((weighted - pull) / 2).view(x.shape))
    assert torch.equal(weight.grad, (g * d / 2).sum((0, 2, 3)))
    assert torch.equal(bias.grad, g.sum((0, 2, 3)))


def test_one_value_in_a_group_is_its_own_mean(isa: str) -> None:
    x = fk.to_batch_last(torch.randn(9, 3, 1, 1)).requires_grad_()
    weight, bias = parameters(3, torch.float32)
    y = group_norm(x, 3, weight, bias)
    y.backward(torch.randn(9, 3, 1, 1))
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand_as(y))
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_a_mean_far_from_zero_does_not_cancel(isa: str, offset: float) -> None:
    x = fk.to_batch_last(torch.randn(33, 4, 40, 40) + offset)
    check(x, 2, upstream("batch_last", x), False)
    ops: Any = torch.ops.fedpai
    mean, invstd = ops.group_norm(x, 2, None, None, 0.0, False)[1]
    var, exact_mean = torch.var_mean(x.double().reshape(33, 2, -1), 2, correction=0)
    assert ((invstd.double().t() ** -2 - var).abs() / var).max() < 1e-6
    assert ((mean.double().t() - exact_mean).abs() / exact_mean).max() < 1e-7


def test_channels_of_a_group_far_from_one_another_do_not_cancel(isa: str) -> None:
    x = torch.randn(17, 6, 9, 9) + torch.tensor([0.0, 1e4, -1e4, 3.0, 1e3, 0.0]).view(-1, 1, 1)
    x = fk.to_batch_last(x)
    check(x, 2, upstream("batch_last", x), True)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((64, 2, 40, 40), 1), ((64, 64, 8, 8), 32), ((7, 3, 65, 33), 1), ((80, 70, 6, 6), 2)],
)
def test_the_bits_do_not_depend_on_the_number_of_threads(
    set_threads: Callable[[int], None], shape: tuple[int, ...], groups: int
) -> None:
    x, dy = fk.to_batch_last(torch.randn(shape)), fk.to_batch_last(torch.randn(shape))
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(run(ours(True), x, groups, dy))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinity_stay_in_their_image_and_group(isa: str) -> None:
    x = torch.randn(5, 4, 4, 4)
    x[2, 1, 3, 0], x[4, 2, 0, 1] = float("nan"), float("inf")
    y = group_norm(x, 2, relu=True)
    bad = torch.zeros(5, 4, dtype=torch.bool)
    bad[2, :2] = bad[4, 2:] = True
    assert y[bad].isnan().all()
    assert torch.isfinite(y[~bad]).all()


@pytest.mark.parametrize("given", ["none", "weight", "bias"])
def test_parameters_may_be_absent_one_by_one(given: str) -> None:
    x = torch.randn(6, 4, 4, 4)
    weight = torch.randn(4) if given == "weight" else None
    bias = torch.randn(4) if given == "bias" else None
    torch.testing.assert_close(group_norm(x, 2, weight, bias), F.group_norm(x, 2, weight, bias))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_layouts_are_converted(layout: torch.memory_format) -> None:
    x, strided = torch.randn(6, 4, 4, 5).to(memory_format=layout), torch.randn(8)[::2]
    y = group_norm(x, 2, strided, strided)
    assert fk.is_batch_last(y)
    torch.testing.assert_close(y, F.group_norm(x, 2, strided, strided))


def test_gradients_that_are_not_wanted_are_not_computed() -> None:
    x, dy, (weight, bias) = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), parameters(2, torch.float32)
    expected = run(torchs(False), x, 2, dy)
    weight.requires_grad_()
    group_norm(x, 2, weight, bias).backward(dy)
    assert x.grad is None
    assert bias.grad is None
    torch.testing.assert_close(weight.grad, expected[2])
    x.requires_grad_()
    group_norm(x, 2, weight.detach(), bias).backward(dy)
    torch.testing.assert_close(x.grad, expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, expected[2])


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_gradcheck_twice(relu: bool) -> None:
    x = fk.to_batch_last(torch.randn(3, 4, 2, 3, dtype=torch.float64)).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters(4, torch.float64))

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(x, 2, weight, bias, relu=relu)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


def test_create_graph_where_the_input_comes_from_the_same_weight() -> None:
    x = fk.to_batch_last(torch.randn(3, 4, 2, 3, dtype=torch.float64)).requires_grad_()
    leaves = x, *(p.requires_grad_() for p in parameters(4, torch.float64))

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(group_norm(x, 2, weight, bias).tanh(), 2, weight, bias).tanh()

    expected = torch.autograd.grad(f(*leaves).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(f(*leaves).sum(), leaves, create_graph=True), expected)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_opcheck() -> None:
    ops: Any = torch.ops.fedpai
    weight, bias = parameters(4, torch.float32)
    for x in (fk.to_batch_last(torch.randn(5, 4, 4, 2)), torch.randn(5, 4, 4, 2)):
        torch.library.opcheck(ops.group_norm.default, (x, 2, weight, bias, 1e-5, True))
        torch.library.opcheck(ops.group_norm.default, (x, 4, None, None, 1e-5, False))
        dy, stats = torch.randn(x.shape), ops.group_norm(x, 2, weight, bias, 1e-5, True)[1]
        backward = ops.group_norm_backward.default
        torch.library.opcheck(backward, (dy, x, 2, weight, bias, stats, True, True, True))
        torch.library.opcheck(backward, (dy, x, 2, None, None, stats, False, False, True))
        torch.library.opcheck(backward, (dy, x, 2, weight, None, stats, False, True, False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(ours(True), fullgraph=True, backend=backend)
    for n in (3, 6):
        x = fk.to_batch_last(torch.randn(n, 4, 5, 2))
        dy = torch.randn(n, 4, 5, 2)
        for a, b in zip(run(compiled, x, 2, dy), run(ours(True), x, 2, dy), strict=True):
            assert torch.equal(a, b)
    torch.compiler.reset()


def test_an_empty_batch() -> None:
    y = group_norm(torch.zeros(0, 4, 3, 3), 2, relu=True)
    assert y.shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 4, 4), 2), ValueError, r"x: expected a shape \(N, C, H, W\)"),
        ((torch.zeros(2, 4, 4, 4, dtype=torch.bfloat16), 2), TypeError, "bfloat16"),
        (
            (torch.zeros(2, 4, 4, 4), 3),
            ValueError,
            "num_groups: expected a divisor of the 4 channels of x, got 3",
        ),
        ((torch.zeros(2, 4, 4, 4), 0), ValueError, "num_groups: expected a divisor"),
        ((torch.zeros(2, 4, 4, 4), 2, torch.ones(2)), ValueError, "weight: expected shape"),
        ((torch.zeros(2, 4, 4, 4), 2, None, torch.ones(4).double()), TypeError, "bias: expected the dtype"),
        ((torch.zeros(1, 4, 1, 1), 4), ValueError, "more than 1 value per channel"),
        ((torch.zeros(2, 4, 4, 4, device="meta"), 2), ValueError, "on the CPU"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_norm(*arguments)
