# SPDX-License-Identifier: Apache-2.0
"""Activations in the pass of a batch norm: the piecewise linear ones bit for bit torch's after our norm, the smooth
ones against 40 digits over the whole range, infinities and NaN included."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.ops.activation import Activation
from fedpai_kernels.ops.norm import batch_norm
from tests.ops.activations import ALL, PIECEWISE, SMOOTH, reference
from tests.ops.norms import run, settings, upstream

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["norm", "sum"])
SHAPES = {
    "two_values_per_channel": (2, 3, 1, 1),
    "n_below_vector": (3, 5, 3, 4),
    "n_not_multiple": (65, 3, 9, 7),
    "whole_blocks": (64, 4, 8, 4),
    "rows_cut_among_threads": (64, 2, 40, 40),
}


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = fk.to_batch_last(torch.randn(shape, dtype=dtype) * 4 + 0.5)
    return x, fk.to_batch_last(torch.randn(shape, dtype=dtype))


def fused(name: str) -> Callable[..., Tensor]:
    return lambda *args, **residual: batch_norm(*args, activation=ALL[name][0], **residual)


def apart(name: str) -> Callable[..., Tensor]:
    """Our norm, then torch's own operations."""

    def f(*args: Tensor, residual: Tensor | None = None) -> Tensor:
        y = batch_norm(*args)
        return ALL[name][1](y if residual is None else y + residual)

    return f


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", PIECEWISE)
@TRAINING
@RESIDUAL
@DTYPE
def test_piecewise_linear_bit_for_bit(
    isa: str, name: str, shape: tuple[int, ...], training: bool, with_residual: bool, dtype: torch.dtype
) -> None:
    x, residual = operands(shape, dtype)
    dy = upstream("batch_last", x)
    ours, theirs = (run(f(name), x, dy, training, residual if with_residual else None) for f in (fused, apart))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["contiguous", "expanded", "sliced"])
@pytest.mark.parametrize("name", ALL)
@RESIDUAL
def test_upstream_gradient_of_any_strides(isa: str, kind: str, name: str, with_residual: bool) -> None:
    x, residual = operands((9, 4, 5, 6), torch.float64)
    dy = upstream(kind, x)
    ours, theirs = (run(f(name), x, dy, True, residual if with_residual else None) for f in (fused, apart))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", SMOOTH)
@TRAINING
@RESIDUAL
def test_smooth_ones_in_float32(
    isa: str, name: str, shape: tuple[int, ...], training: bool, with_residual: bool
) -> None:
    """At most twice the error of torch's separate float32 operations, three times for gradients, and some eps."""
    x, residual = operands(shape, torch.float32)
    dy = upstream("batch_last", x)
    given = residual if with_residual else None
    wide = run(apart(name), x.double(), dy.double(), training, None if given is None else given.double())

    def plain(*args: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.batch_norm(*args)
        return SMOOTH[name][1](y if residual is None else y + residual)

    ours, theirs = (run(f, x, dy, training, given) for f in (fused(name), plain))
    for i, (o, t, w) in enumerate(zip(ours, theirs, wide, strict=True)):
        scale = float(w.abs().max()) + (float(dy.abs().max()) if i == 1 else 0.0)
        limit = (2 if i == 0 else 3) * float((t - w).abs().max()) + 16 * 2.0**-23 * scale
        assert float((o - w).abs().max()) <= limit, i


def alone(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The activation and its derivative at the elements of x, through a norm that changes nothing."""
    leaf = fk.to_batch_last(x.view(-1, 1, 1, 1)).requires_grad_()
    mean, var = torch.zeros(1, dtype=x.dtype), torch.ones(1, dtype=x.dtype)
    y = batch_norm(leaf, mean, var, None, None, False, eps=0.0, activation=ALL[name][0])
    y.sum().backward()
    assert leaf.grad is not None
    return y.detach().flatten(), leaf.grad.flatten()


def points(dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    far = 60.0 if dtype == torch.float32 else 600.0
    small = torch.logspace(-30, 1, 60, dtype=torch.float64)
    parts = [torch.linspace(-far, far, 401), torch.randn(300, generator=draw) * 3, small, -small]
    return torch.cat([part.double() for part in parts]).to(dtype)


# Of torch's double and of ours: in units of the last place of the exact value, but for GELU in its tanh form more where
# the argument of the exponential is large, and rounded at magnitudes below the smallest normal number.
ULPS = {"silu": 4.0, "gelu": 6.0, "gelu_tanh": 6.0}


@pytest.mark.parametrize("name", SMOOTH)
@DTYPE
def test_values_in_units_of_the_last_place(isa: str, name: str, dtype: torch.dtype) -> None:
    x = points(dtype)
    y, derivative = alone(x, name)
    exact, exact_derivative = reference(name, x)
    limits = torch.finfo(dtype)
    for at, got, want in zip(x.tolist(), y.tolist(), exact, strict=True):
        ulps = ULPS[name]
        if name == "gelu_tanh" and at < 0:
            ulps += 2.5 * abs(1.6 * at * (1 + 0.044715 * at * at))
        floor = limits.smallest_normal if name != "silu" else limits.smallest_normal * limits.eps * abs(at)
        assert abs(mpmath.mpf(got) - want) <= ulps * limits.eps * abs(want) + floor, (at, got, want)
    for at, got, want in zip(x.tolist(), derivative.tolist(), exact_derivative, strict=True):
        assert abs(mpmath.mpf(got) - want) <= 4 * limits.eps, (at, got, want)


def at_the_ends(name: str, x: Tensor) -> Tensor:
    """Torch's values; of GELU by its formula, because torch's AVX-512 form in float32 is NaN at infinity."""
    return x * (0.5 * (1 + torch.erf(x * 0.5**0.5))) if name == "gelu" else ALL[name][1](x)


@pytest.mark.parametrize("name", ALL)
@DTYPE
def test_infinities_nan_and_the_largest_numbers(isa: str, name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), largest, -largest, 0.0], dtype=dtype).repeat(5)
    y, derivative = alone(x, name)
    expected = at_the_ends(name, x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
    finite = x.isfinite()
    slopes = {"relu6": (0.0, 0.0), "relu": (1.0, 0.0)}.get(name, (1.0, ALL[name][0].slope))
    assert torch.equal(derivative[finite][:2], torch.tensor(slopes, dtype=dtype))
    assert torch.isfinite(derivative[finite]).all()


@pytest.mark.parametrize("name", ALL)
@RESIDUAL
def test_the_bits_depend_neither_on_threads_nor_on_what_is_wanted(
    set_threads: Callable[[int], None], name: str, with_residual: bool
) -> None:
    x, residual = operands((64, 2, 40, 40), torch.float32)
    dy, given = torch.randn_like(x), residual if with_residual else None
    before, results = dy.clone(), []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(run(fused(name), x, dy, True, given))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(dy, before)
    for training in (True, False):
        whole = run(fused(name), x, dy, training, given)
        leaf = x.clone().requires_grad_()
        mean, var, weight, bias = settings(2, torch.float32)
        batch_norm(
            leaf, mean, var, weight, bias, training, activation=ALL[name][0], residual=given
        ).backward(dy)  # fmt: skip
        assert torch.equal(leaf.grad, whole[1])


@pytest.mark.parametrize("name", ALL)
@TRAINING
@RESIDUAL
def test_gradcheck_twice(name: str, training: bool, with_residual: bool) -> None:
    x, residual = (t.requires_grad_() for t in operands((3, 2, 2, 3), torch.float64))
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    statistics = (None, None) if training else (torch.zeros(2).double(), torch.ones(2).double())

    def f(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        given = residual if with_residual else None
        y = batch_norm(x, *statistics, weight, bias, training, activation=ALL[name][0], residual=given)
        return y if with_residual else y + residual

    assert torch.autograd.gradcheck(f, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, residual))


@pytest.mark.parametrize("name", ALL)
@TRAINING
def test_create_graph_where_the_input_comes_from_the_residual(name: str, training: bool) -> None:
    residual = operands((3, 2, 2, 3), torch.float64)[1].requires_grad_()
    statistics = (None, None) if training else (torch.zeros(2).double(), torch.ones(2).double())

    def f(residual: Tensor) -> Tensor:
        return batch_norm(
            residual.tanh(), *statistics, None, None, training, activation=ALL[name][0], residual=residual
        ).tanh()  # fmt: skip

    (expected,) = torch.autograd.grad(f(residual).sum(), residual)
    (again,) = torch.autograd.grad(f(residual).sum(), residual, create_graph=True)
    torch.testing.assert_close(again, expected)
    assert torch.autograd.gradgradcheck(f, residual)


@pytest.mark.parametrize("name", ["leaky_relu", "silu"])
@RESIDUAL
def test_compiles(name: str, with_residual: bool) -> None:
    torch.compiler.reset()
    x, residual = operands((5, 3, 4, 4), torch.float32)
    dy = torch.randn_like(x)

    def f(x: Tensor, residual: Tensor) -> Tensor:
        given = residual if with_residual else None
        return batch_norm(x, None, None, None, None, True, activation=ALL[name][0], residual=given) * 2

    results = []
    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        z = call(leaf, residual)
        z.backward(dy)
        results.append((z.detach(), leaf.grad))
    torch.compiler.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_string_names_one_and_an_empty_batch_has_it_too() -> None:
    x = torch.randn(4, 3, 2, 2)
    expected = batch_norm(x, None, None, None, None, True, relu=True)
    assert torch.equal(batch_norm(x, None, None, None, None, True, activation="relu"), expected)
    assert batch_norm(x[:0], None, None, None, None, True, activation="silu").shape == (0, 3, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "tanh"}, "activation: expected one of none, relu, .*, got 'tanh'"),
        ({"activation": Activation("leaky_relu", -0.1)}, "activation: expected a finite slope >= 0"),
        ({"activation": Activation("leaky_relu", float("nan"))}, "activation: expected a finite slope >= 0"),
        ({"activation": Activation("silu", 0.1)}, "of leaky_relu only, got 0.1 for silu"),
        ({"activation": "silu", "relu": True}, "relu, activation: expected one of them"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_norm(torch.zeros(2, 3, 4, 4), None, None, None, None, True, **arguments)  # type: ignore[arg-type]
