# SPDX-License-Identifier: Apache-2.0
"""Pooling of batch-last activations: bit for bit torch's, forward and backward, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.ops import pool

IMAGES = {
    "n_is_1": (1, 3, 5, 5),
    "n_below_vector": (2, 1, 4, 3),
    "n_is_7": (7, 2, 6, 9),
    "n_not_multiple": (33, 2, 8, 8),
    "n_is_65": (65, 2, 9, 7),
}
# kernel_size, stride, padding, dilation, ceil_mode
WINDOWS: dict[str, tuple[Any, Any, Any, Any, bool]] = {
    "2x2": (2, 2, 0, 1, False),
    "3x3_stride_2_padded": (3, 2, 1, 1, False),
    "overlapping_ceil": (3, 1, 1, 1, True),
    "gaps_between_windows": (2, 3, 1, 1, True),
    "not_square": ((3, 2), (2, 1), (1, 0), (1, 2), False),
    "dilated_ceil": (2, 2, 0, 2, True),
    "dilated_padded_ceil": (3, 2, 1, 2, True),
    "one_by_one": (1, 1, 0, 1, False),
    "one_by_one_stride_2": (1, 2, 0, 1, True),
}
DATA: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "ties": lambda shape: torch.randint(-2, 3, shape).float(),
    "normal": torch.randn,
    "nan": lambda shape: torch.where(torch.rand(shape) < 0.2, float("nan"), torch.randn(shape)),
    "minus_infinity": lambda shape: torch.where(torch.rand(shape) < 0.5, -float("inf"), torch.randn(shape)),
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


def compare(ours: Callable[[Tensor], Tensor], torchs: Callable[[Tensor], Tensor], x: Tensor) -> None:
    theirs_in = x.clone().requires_grad_()
    our_in = fk.to_batch_last(x).clone(memory_format=torch.preserve_format).requires_grad_()
    expected, y = torchs(theirs_in), ours(our_in)
    assert fk.is_batch_last(y)
    assert same_bits(y, expected)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    y.backward(dy)
    assert our_in.grad is not None
    assert theirs_in.grad is not None
    assert fk.is_batch_last(our_in.grad)
    assert same_bits(our_in.grad, theirs_in.grad)


def fits(shape: tuple[int, ...], window: tuple[Any, Any, Any, Any, bool]) -> bool:
    kernel, _, padding, dilation, _ = window
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (kernel, padding, dilation)]
    return all(shape[2 + d] + 2 * pairs[1][d] > pairs[2][d] * (pairs[0][d] - 1) for d in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES.keys())
def test_max_pool2d(isa: str, shape: tuple[int, ...], window: Any, dtype: torch.dtype) -> None:
    if not fits(shape, window):
        with pytest.raises(ValueError, match="smaller than a window"):
            pool.max_pool2d(torch.zeros(shape), *window)
        return
    for make in DATA.values():
        compare(
            lambda v: pool.max_pool2d(v, *window), lambda v: F.max_pool2d(v, *window), make(shape).to(dtype)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extra", [{}, {"count_include_pad": False}, {"divisor_override": -3}], ids=str)
@pytest.mark.parametrize("name", [n for n in WINDOWS if "dilated" not in n])
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES.keys())
def test_avg_pool2d(
    isa: str, shape: tuple[int, ...], name: str, extra: dict[str, Any], dtype: torch.dtype
) -> None:
    kernel, stride, padding, _, ceil_mode = WINDOWS[name]
    arguments = (kernel, stride, padding, ceil_mode)
    compare(
        lambda v: pool.avg_pool2d(v, *arguments, **extra),
        lambda v: F.avg_pool2d(v, *arguments, **extra),
        torch.randn(shape, dtype=dtype),
    )


@pytest.mark.parametrize("size", [1, (1, 1), (2, 3), (5, 1), (None, 2), 7, None], ids=str)
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES.keys())
def test_adaptive_avg_pool2d(isa: str, shape: tuple[int, ...], size: Any) -> None:
    """Exact: sums of few small integers; the quotients differ from torch's (which divides twice) by rounding."""
    theirs = torch.randint(-8, 9, shape).float().requires_grad_()
    x = fk.to_batch_last(theirs.detach()).clone(memory_format=torch.preserve_format).requires_grad_()
    if size is None or (isinstance(size, tuple) and None in size):
        size = tuple(s or d for s, d in zip(size or (None, None), shape[2:], strict=True))
    expected, y = F.adaptive_avg_pool2d(theirs, size), pool.adaptive_avg_pool2d(x, size)
    dy = torch.randint(-8, 9, expected.shape).float()
    expected.backward(dy)
    y.backward(dy)
    assert fk.is_batch_last(y)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=4 * eps, atol=8 * eps)


def test_none_keeps_the_size() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert pool.adaptive_avg_pool2d(x, (None, 2)).shape == (2, 3, 4, 2)
    assert torch.equal(pool.adaptive_avg_pool2d(x, None), x)


def test_a_large_window_and_a_large_image() -> None:
    x = torch.randn(3, 2, 60, 45)
    compare(lambda v: pool.max_pool2d(v, (50, 20), 3), lambda v: F.max_pool2d(v, (50, 20), 3), x)
    x = torch.randn(20, 8, 40, 40)  # enough for several threads
    compare(lambda v: pool.max_pool2d(v, 2), lambda v: F.max_pool2d(v, 2), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_layouts_are_converted(layout: torch.memory_format) -> None:
    x = torch.randn(6, 3, 4, 6).to(memory_format=layout)
    assert torch.equal(pool.max_pool2d(x, 2), F.max_pool2d(x, 2))
    assert fk.is_batch_last(pool.max_pool2d(x, 2))


@pytest.mark.parametrize("kind", ["expanded", "sliced"])
def test_upstream_gradient_of_any_strides(kind: str) -> None:
    values = {
        "expanded": torch.randn(1, 3, 1, 1).expand(9, 3, 2, 3),
        "sliced": torch.randn(9, 6, 2, 3)[:, ::2],
    }
    for ours, theirs in (
        (pool.max_pool2d, F.max_pool2d),
        (pool.avg_pool2d, F.avg_pool2d),
    ):
        x, other = (t.requires_grad_() for t in (torch.randn(9, 3, 4, 6),) * 2)
        assert torch.equal(
            torch.autograd.grad(ours(x, 2), x, values[kind])[0],
            torch.autograd.grad(theirs(other, 2), other, values[kind])[0],
        )


@pytest.mark.parametrize(
    "f",
    [
        lambda v: pool.max_pool2d(v, 2, 1, 1, 1, True),
        lambda v: pool.max_pool2d(v, (2, 1), (1, 2), 0, (2, 1)),
        lambda v: pool.avg_pool2d(v, 3, 2, 1, True, False),
        lambda v: pool.adaptive_avg_pool2d(v, (2, 3)),
    ],
)
def test_gradcheck_twice(f: Callable[[Tensor], Tensor]) -> None:
    x = fk.to_batch_last(torch.randn(2, 2, 4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


def test_the_gradient_of_max_pooling_s_gradient() -> None:
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for f in (pool.max_pool2d, F.max_pool2d):
        (first,) = torch.autograd.grad(f(x, 3, 2, 1).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        results.append((first.detach(), second))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_opcheck() -> None:
    x = fk.to_batch_last(torch.randn(5, 3, 4, 6))
    rows, columns = [4, 2, 2, 2, 0, 1], [6, 3, 2, 2, 0, 1]
    ops: Any = torch.ops.fedpai
    y, argmax = ops.max_pool2d(x, rows, columns)
    torch.library.opcheck(ops.max_pool2d.default, (x, rows, columns))
    torch.library.opcheck(ops.max_pool2d_dx.default, (y, argmax, rows, columns))
    torch.library.opcheck(ops.avg_pool2d.default, (x, rows, columns, True, 0))
    torch.library.opcheck(ops.avg_pool2d_dx.default, (y, rows, columns, True, 0))
    torch.library.opcheck(ops.adaptive_avg_pool2d.default, (x, rows, columns))
    torch.library.opcheck(ops.adaptive_avg_pool2d_dx.default, (y, rows, columns))


def test_an_empty_batch() -> None:
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    pool.max_pool2d(x, 2).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pool.max_pool2d(torch.zeros(3, 4, 4), 2), ValueError, r"x: expected a shape \(N, C, H, W\)"),
        (lambda: pool.max_pool2d(torch.zeros(1, 3, 4, 4).half(), 2), TypeError, "float16"),
        (lambda: pool.max_pool2d(torch.zeros(1, 3, 4, 4), 0), ValueError, "kernel_size: expected at least 1"),
        (lambda: pool.max_pool2d(torch.zeros(1, 3, 4, 4), 2, 0), ValueError, "stride: expected at least 1"),
        (lambda: pool.max_pool2d(torch.zeros(1, 3, 4, 4), 2, 2, 2), ValueError, "at most half of the window"),
        (
            lambda: pool.max_pool2d(torch.zeros(1, 3, 4, 4), (2, 2, 2)),
            ValueError,
            "kernel_size: expected one int",
        ),
        (lambda: pool.avg_pool2d(torch.zeros(1, 3, 4, 4), 5), ValueError, "smaller than a window"),
        (
            lambda: pool.avg_pool2d(torch.zeros(1, 3, 4, 4), 2, divisor_override=0),
            ValueError,
            "divisor_override",
        ),
        (
            lambda: pool.adaptive_avg_pool2d(torch.zeros(1, 3, 4, 4), 0),
            ValueError,
            "output_size: expected at least",
        ),
        (lambda: pool.adaptive_avg_pool2d(torch.zeros(1, 3, 0, 4), 1), ValueError, "at least one pixel"),
    ],
)
def test_errors(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
