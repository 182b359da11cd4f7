# SPDX-License-Identifier: Apache-2.0
"""conv2d(relu(batch_norm(x))) as one: bit for bit the two separate ones, and dense-masked torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels import Plan
from fedpai_kernels.ops import norm_conv2d as norm_conv2d_module
from fedpai_kernels.ops.conv2d import sparse_conv2d
from fedpai_kernels.ops.norm import batch_norm
from fedpai_kernels.ops.norm_conv2d import norm_conv2d
from fedpai_kernels.ops.norm_kernels import given_statistics
from tests.cases import CONV2D, Conv2dCase
from tests.ops.norms import upstream

RELU = pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Operands(NamedTuple):
    """Of a norm of x's channels and of a convolution behind it; all but the statistics are leaves."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    values: Tensor
    conv_bias: Tensor | None
    mean: Tensor
    var: Tensor


def operands(
    shape: tuple[int, ...], plan: Plan, dtype: torch.dtype = torch.float32, *, affine: bool = True
) -> Operands:
    draw = torch.Generator().manual_seed(1)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draw, dtype=torch.float64).to(dtype)

    channels = shape[1]
    x = fk.to_batch_last(normal(*shape) * 2 + 0.5).requires_grad_()
    weight, bias = (normal(channels).requires_grad_() if affine else None for _ in range(2))
    values, conv_bias = (normal(n).requires_grad_() for n in (plan.nnz, plan.mask_shape[0]))
    return Operands(x, weight, bias, values, conv_bias, normal(channels), normal(channels).abs() + 0.5)


def gradients(y: Tensor, o: Operands, dy: Tensor) -> dict[str, Tensor]:
    leaves = {k: t for k, t in o._asdict().items() if t is not None and t.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def check(
    plan: Plan, shape: tuple[int, ...], training: bool, relu: bool, kind: str = "batch_last",
    dtype: torch.dtype = torch.float32, affine: bool = True, **geometry: object,
) -> None:  # fmt: skip
    """One operation against two, bit for bit."""
    together, apart = (operands(shape, plan, dtype, affine=affine) for _ in range(2))
    o = together
    y = norm_conv2d(
        o.x, o.mean, o.var, o.weight, o.bias, training, 0.1, 1e-5, o.values, plan, o.conv_bias, relu=relu, **geometry
    )
    o = apart
    h = batch_norm(o.x, o.mean, o.var, o.weight, o.bias, training, 0.1, 1e-5, relu=relu)
    expected = sparse_conv2d(h, o.values, plan, o.conv_bias, **geometry)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    dy = upstream(kind, y).to(dtype)
    before = dy.clone()
    ours, theirs = gradients(y, together, dy), gradients(expected, apart, dy)
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name
    assert torch.equal(dy, before)
    assert torch.equal(together.mean, apart.mean)
    assert torch.equal(together.var, apart.var)


def of_case(case: Conv2dCase) -> dict[str, object]:
    return {"stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups}


WITH_IMAGES = [case for case in CONV2D if case.batch > 0]


@pytest.mark.parametrize("case", WITH_IMAGES, ids=lambda case: case.name)
@RELU
def test_every_geometry(isa: str, walk: str, case: Conv2dCase, relu: bool) -> None:
    n, _, h, w = case.input_shape
    check(case.plan, case.input_shape, n * h * w > 1, relu, **of_case(case))


PLAN = Plan.from_mask(torch.rand(9, 7, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 15, 16, 17, 31, 33, 65])
@TRAINING
@RELU
def test_every_batch(isa: str, walk: str, batch: int, training: bool, relu: bool, dtype: torch.dtype) -> None:
    check(PLAN, (batch, 7, 6, 5), training, relu, dtype=dtype, padding=1)


@pytest.mark.parametrize("kind", ["contiguous", "expanded", "sliced"])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_any_strides(isa: str, walk: str, kind: str, affine: bool) -> None:
    check(PLAN, (19, 7, 6, 5), True, True, kind, affine=affine, padding=1, stride=2)


@settings(deadline=None)
@given(
    batch=st.integers(1, 40), height=st.integers(1, 9), width=st.integers(1, 9), kernel=st.integers(1, 3),
    stride=st.integers(1, 3), padding=st.integers(0, 2), relu=st.booleans(), training=st.booleans(),
    threads=st.integers(1, 3), seed=st.integers(0, 9), rows=st.integers(1, 4),
)  # fmt: skip
def test_any_shape(
    batch: int, height: int, width: int, kernel: int, stride: int, padding: int, relu: bool, training: bool,
    threads: int, seed: int, rows: int,
) -> None:  # fmt: skip
    height, width = max(height, kernel - 2 * padding), max(width, kernel - 2 * padding)
    mask = torch.rand(4, 5, kernel, kernel, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[0, 0] = True
    mask = mask[torch.arange(4) // rows]  # blocks of so many output channels
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        training = training and batch * height * width > 1
        check(Plan.from_mask(mask), (batch, 5, height, width), training, relu, stride=stride, padding=padding)
    finally:
        torch.set_num_threads(before)


@TRAINING
@RELU
def test_in_double_it_is_dense_masked_torch(walk: str, training: bool, relu: bool) -> None:
    o = operands((10, 7, 8, 8), PLAN, torch.float64)
    mean, var = o.mean.clone(), o.var.clone()
    y = norm_conv2d(
        o.x, o.mean, o.var, o.weight, o.bias, training, 0.1, 1e-5, o.values, PLAN, o.conv_bias, padding=1, relu=relu
    )
    h = F.batch_norm(o.x, mean, var, o.weight, o.bias, training, 0.1, 1e-5)
    expected = F.conv2d(torch.relu(h) if relu else h, PLAN.unpack(o.values), o.conv_bias, padding=1)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    ours, theirs = gradients(y, o, dy), gradients(expected, o, dy)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    torch.testing.assert_close(o.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(o.var, var, rtol=1e-12, atol=1e-12)


@TRAINING
def test_gradients_of_gradients(training: bool) -> None:
    plan = Plan.from_mask(torch.rand(3, 2, 3, 3) < 0.5)
    o = operands((3, 2, 4, 4), plan, torch.float64)

    def f(x: Tensor, weight: Tensor, bias: Tensor, values: Tensor, conv_bias: Tensor) -> Tensor:
        mean, var = o.mean.clone(), o.var.clone()
        return norm_conv2d(x, mean, var, weight, bias, training, 0.1, 1e-5, values, plan, conv_bias, padding=1)

    leaves = (o.x, o.weight, o.bias, o.values, o.conv_bias)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@TRAINING
def test_create_graph_where_the_input_comes_from_the_same_weights(training: bool) -> None:
    plan = Plan.from_mask(torch.rand(2, 2, 3, 3) < 0.5)
    o = operands((3, 2, 4, 4), plan, torch.float64)
    leaves = o.x, o.weight, o.bias, o.values

    def f(x: Tensor, weight: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        for _ in range(2):
            statistics = o.mean.clone(), o.var.clone()
            x = norm_conv2d(x.tanh(), *statistics, weight, bias, training, 0.1, 1e-5, values, plan, padding=1)
        return x.tanh()

    expected = torch.autograd.grad(f(*leaves).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(f(*leaves).sum(), leaves, create_graph=True), expected)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "values", "conv_bias", "x values", "weight conv_bias"])
@TRAINING
def test_only_what_needs_a_gradient_gets_one(
    walk: str, wanted: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(names: str) -> dict[str, Tensor | None]:
        o = operands((9, 7, 6, 5), PLAN)
        leaves = {k: t for k, t in o._asdict().items() if k not in ("mean", "var")}
        for name, t in leaves.items():
            t.requires_grad_(name in names.split())
        y = norm_conv2d(
            o.x, o.mean, o.var, o.weight, o.bias, training, 0.1, 1e-5, o.values, PLAN, o.conv_bias, relu=True
        )
        y.backward(torch.ones_like(y))
        return {k: t.grad for k, t in leaves.items()}

    with monkeypatch.context() as patch:
        if wanted == "values":  # has a walk of its own, whose sums have another order than those of one for both
            patch.setattr(norm_conv2d_module, "has_backward", lambda t: False)
        complete = some("x weight bias values conv_bias")
    for name, gradient in some(wanted).items():
        if name in wanted.split():
            assert torch.equal(gradient, complete[name]), name
        else:
            assert gradient is None, name


def test_padding_stays_zero_and_infinities_stay_where_they_are(isa: str, walk: str) -> None:
    """A pixel outside the image is not shift, and one that no weight reads changes nothing."""
    mask = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 0] = True  # the left neighbour in channel 0
    plan, x = Plan.from_mask(mask), torch.randn(5, 2, 3, 4)
    x[:, 1] = float("inf")
    mean, var, bias = torch.zeros(2), torch.ones(2), torch.full((2,), 7.0)
    y = norm_conv2d(
        fk.to_batch_last(x), mean, var, None, bias, False, 0.1, 0.0, torch.ones(1), plan, padding=1, relu=True
    )
    assert torch.equal(y[:, 0, :, 0], torch.zeros(5, 3))
    assert torch.equal(y[:, 0, :, 1:], torch.relu(x[:, 0, :, :-1] + 7))


def test_nan_reaches_the_sums_that_read_it(isa: str, walk: str) -> None:
    x = torch.zeros(17, 7, 4, 4)
    x[3, 2, 1, 1] = float("nan")
    mean, var = torch.zeros(7), torch.ones(7)
    plan = Plan.from_mask(torch.ones(2, 7, 1, 1, dtype=torch.bool))
    y = norm_conv2d(
        fk.to_batch_last(x), mean, var, None, None, False, 0.1, 1e-5, torch.ones(plan.nnz), plan, relu=True
    )
    hit = torch.zeros(17, 2, 4, 4, dtype=torch.bool)
    hit[3, :, 1, 1] = True
    assert torch.equal(y.isnan(), hit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.fedpai
    o = operands((9, 7, 6, 5), PLAN, dtype)
    x, weight, bias, values, conv_bias = (t.detach() for t in o[:5] if t is not None)
    stats, geometry = given_statistics(o.mean, o.var, 1e-5), [1, 1, 1, 1, 1, 1, 1, 1]
    norm = (x, stats, weight, bias, True)
    dy, dh = torch.randn(9, 9, 6, 5, dtype=dtype), fk.to_batch_last(torch.randn_like(x))
    # The numbers of plans cannot be found by tests that make up arguments.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for op, arguments in (
        (ops.batch_norm_statistics.default, (x, 1e-5)),
        (ops.norm_conv2d_forward.default, (*norm, values, conv_bias, PLAN.handle, geometry)),
        (ops.norm_conv2d_weight_grad.default, (*norm, dy, PLAN.handle, True, geometry)),
        (ops.norm_conv2d_backward.default, (*norm, dy, values, PLAN.handle, True, geometry)),
        (ops.batch_norm_backward_.default, (dh, x, weight, bias, stats, True, True, True, True)),
    ):
        torch.library.opcheck(op, arguments, test_utils=tests)


REFUSED: dict[str, tuple[Callable[[Operands], dict[str, object]], str]] = {
    "dtype": (lambda o: {"values": o.values.double()}, "values: expected the dtype of x"),
    "channels": (lambda o: {"x": o.x[:, :3]}, "channels|per channel"),
    "parameter": (lambda o: {"norm_weight": torch.ones(3)}, "weight: expected shape"),
    "statistics": (lambda o: {"running_mean": None}, "running_mean, running_var: both are needed"),
    "groups": (lambda o: {"groups": 7}, "groups: the plan was made for 1, got 7"),
    "no images": (lambda o: {"x": o.x[:0]}, "x: expected at least one element"),
    "image": (lambda o: {"x": o.x[:, :, :2], "padding": 0}, "too small for a kernel"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(name: str) -> None:
    o = operands((4, 7, 5, 5), PLAN)
    changed, message = REFUSED[name]
    arguments = {
        "x": o.x, "running_mean": o.mean, "running_var": o.var, "norm_weight": o.weight, "norm_bias": o.bias,
        "training": name != "statistics", "momentum": 0.1, "eps": 1e-5, "values": o.values, "plan": PLAN,
        "padding": 1,
    }  # fmt: skip
    mean, var = o.mean.clone(), o.var.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        norm_conv2d(**{**arguments, **changed(o)})  # type: ignore[arg-type]
    assert torch.equal(o.mean, mean)
    assert torch.equal(o.var, var)
