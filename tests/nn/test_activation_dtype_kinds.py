# SPDX-License-Identifier: Apache-2.0
"""Activations kept as bfloat16 with every activation after a norm, and with group norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn import BatchLastGroupNorm, BatchLastInstanceNorm2d, DeferrableGroupNorm
from fedpai_kernels.ops.activation import Activation, is_smooth
from fedpai_kernels.ops.group_norm import group_norm
from fedpai_kernels.ops.norm import batch_norm
from fedpai_kernels.ops.norm_conv2d import norm_conv2d
from fedpai_kernels.ops.norm_kernels import given_statistics
from fedpai_kernels.ops.stored import stored, widened
from tests.nn.storing import BF16, gradients, images, network, saved_by
from tests.ops.activations import ALL, BY_NAME, PIECEWISE

ops = torch.ops.fedpai
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
KINDS = {"none": Activation("none"), **BY_NAME}


def drawn(*shape: int) -> Tensor:
    x = torch.randn(shape) * 3
    return (fk.to_batch_last(x) if x.dim() == 4 else x).requires_grad_()


def kept(x: Tensor) -> Tensor:
    """The numbers of the copy that an autograd function holds."""
    return widened(stored(x)).detach()


def statistics(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    """As the backward pass of a norm reads them."""
    if training:
        exact: Tensor = ops.batch_norm_statistics(x.detach(), 1e-5)
        return exact
    return given_statistics(mean, var, 1e-5)


# ---- operations
# ----------------------------------------------------------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", KINDS)
def test_a_norms_gradients_are_those_of_what_was_kept(
    isa: str, name: str, with_residual: bool, training: bool
) -> None:
    activation = KINDS[name]
    x, residual, weight, bias = drawn(33, 5, 6, 7), drawn(33, 5, 6, 7), drawn(5), drawn(5)
    mean, var, dy = torch.randn(5), torch.rand(5) + 2, torch.randn(33, 5, 6, 7)
    r = residual if with_residual else None
    given = (None, None) if training else (mean, var)
    settings: dict[str, Any] = {"residual": r, "activation": activation}
    y = batch_norm(x, *given, weight, bias, training, **settings, activation_dtype=BF16)
    assert torch.equal(y, batch_norm(x.detach(), *given, weight, bias, training, **settings))
    z = None
    if r is not None and activation.code:
        z = kept(r if is_smooth(activation.code) else y)
    stats = statistics(x, mean, var, training)
    dx, affine, dr = ops.batch_norm_backward(
        dy, kept(x), z, weight.detach(), bias.detach(), stats, training, activation.code, True, True,
        z is not None, activation.slope,
    )  # fmt: skip
    y.backward(dy)
    found = [x.grad, weight.grad, bias.grad]
    assert all(map(torch.equal, found, [dx, *affine]))
    if r is not None:
        assert torch.equal(r.grad, dr if activation.code else dy)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", PIECEWISE)
def test_rounding_takes_no_element_across_a_threshold(isa: str, name: str, with_residual: bool) -> None:
    """With given statistics the gradients of input, residual and bias know x by its derivatives alone."""
    inputs = [drawn(33, 5, 20, 17), drawn(5), drawn(5), drawn(33, 5, 20, 17)]
    mean, var, dy = torch.randn(5), torch.rand(5) + 2, torch.randn(33, 5, 20, 17)
    found: dict[Any, list[Tensor]] = {}
    for dtype in (None, BF16):
        x, weight, bias, residual = (t.detach().clone().requires_grad_() for t in inputs)
        r = residual if with_residual else None
        y = batch_norm(
            x, mean, var, weight, bias, residual=r, activation=BY_NAME[name], activation_dtype=dtype
        )
        if dtype is not None:
            apart = (stored(x).float() != x.to(BF16).float()).sum()
            assert (apart > 0) == (not with_residual)
        y.backward(dy)
        found[dtype] = [t.grad for t in (x, bias, residual) if t.grad is not None]
    assert all(map(torch.equal, found[None], found[BF16]))


@pytest.mark.parametrize("of_result", [False, True])
def test_rounding_for_a_norm_is_registered_in_full(of_result: bool) -> None:
    x, weight, bias = (t.detach() for t in (drawn(33, 5, 6, 7), drawn(5), drawn(5)))
    norm = (None, None, None) if of_result else (weight, bias, ops.batch_norm_statistics(x, 1e-5))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.round_for_norm_backward.default, (x, *norm, 2, 0.0), test_utils=tests)


@TRAINING
@pytest.mark.parametrize("name", KINDS)
def test_a_norm_and_a_convolution_keep_one_rounded_input(
    isa: str, walk: str, name: str, training: bool
) -> None:
    activation = KINDS[name]
    plan = fk.Plan.from_mask(torch.rand(6, 5, 3, 3) < 0.4)
    x, values, weight, bias = drawn(33, 5, 6, 7), drawn(plan.nnz), drawn(5), drawn(5)
    mean, var, dy = torch.randn(5), torch.rand(5) + 2, fk.to_batch_last(torch.randn(33, 6, 4, 5))
    given = (None, None) if training else (mean, var)
    y = norm_conv2d(
        x,
        *given,
        weight,
        bias,
        training,
        0.1,
        1e-5,
        values,
        plan,
        activation=activation,
        activation_dtype=BF16,
    )
    short, stats = kept(x), statistics(x, mean, var, training)
    geometry = y.grad_fn.geometry
    norm = (stats, weight.detach(), bias.detach(), activation.code)
    dx, dvalues, _ = ops.norm_conv2d_backward(
        short, *norm, dy, values.detach(), plan.handle, False, geometry, activation.slope
    )
    affine = ops.batch_norm_backward_(
        dx, short, *norm[1:3], stats, training, activation.code, True, True, activation.slope
    )
    y.backward(dy)
    found = [values.grad, x.grad, weight.grad, bias.grad]
    assert all(map(torch.equal, found, [dvalues, dx, *affine]))


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_gradients_are_refused(name: str) -> None:
    x, r = drawn(4, 5, 6, 7), drawn(4, 5, 6, 7)
    y = batch_norm(x, training=True, residual=r, activation=BY_NAME[name], activation_dtype=BF16)
    with pytest.raises(RuntimeError, match="activation_dtype: gradients of gradients"):
        torch.autograd.grad(y.square().sum(), r, create_graph=True)


# ---- models
# ----------------------------------------------------------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("name", ALL)
def test_a_fused_model_keeps_nothing_else_and_its_gradients_are_near(name: str, training: bool) -> None:
    activate = ALL[name][1]
    ours, plain = (network(dtype, activate).train(training) for dtype in (BF16, None))
    assert all(t.dtype in (BF16, torch.int32) for t in saved_by(ours, images()))
    assert torch.equal(ours(images(33)), plain(images(33)))
    found, expected = gradients(ours, images(33)), gradients(plain, images(33))
    scale = max(float(g.norm()) for g in expected.values())
    for key, g in found.items():
        error = float((g - expected[key]).norm())
        assert error <= 0.01 * float(expected[key].norm()) + 1e-4 * scale, key


# ---- group norms
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("make", [fk.to_batch_last, Tensor.contiguous], ids=["batch_last", "contiguous"])
def test_a_group_norms_gradients_are_those_of_rounded_input(isa: str, make: Any, relu: bool) -> None:
    x, weight, bias = make(torch.randn(33, 6, 5, 7)).requires_grad_(), drawn(6), drawn(6)
    dy = torch.randn(33, 6, 5, 7)
    y, stats = ops.group_norm(x.detach(), 3, weight.detach(), bias.detach(), 1e-5, relu)
    dx, affine = ops.group_norm_backward(
        dy, x.detach().to(BF16).float(), 3, weight.detach(), bias.detach(), stats, relu, True, True
    )
    found = group_norm(x, 3, weight, bias, relu=relu, activation_dtype=BF16)
    assert torch.equal(found, y)
    found.backward(dy)
    assert all(map(torch.equal, [x.grad, weight.grad, bias.grad], [dx, *affine]))


class Grouped(nn.Module):
    """Convolutions between group norms, one with a ReLU, and an instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8)
        self.instance = nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        return self.instance(self.norm2(self.conv2(x)))


def test_group_norms_of_a_model_keep_their_inputs_rounded() -> None:
    model = Grouped()
    masks = {n: torch.rand(getattr(model, n).weight.shape) < 0.3 for n in ("conv", "conv2")}
    report = fk.sparsify_(model, masks, activation_dtype=BF16)
    assert type(model.norm) is DeferrableGroupNorm
    assert type(model.norm2) is BatchLastGroupNorm
    assert type(model.instance) is BatchLastInstanceNorm2d
    assert {m.activation_dtype for m in (model.norm, model.norm2, model.instance)} == {BF16}
    assert "1 DeferrableGroupNorm, 1 BatchLastGroupNorm, 1 BatchLastInstanceNorm2d" in str(report)
    saved = saved_by(model, images())
    assert len(saved) == 5
    assert {t.dtype for t in saved} == {BF16}
    y = model(images()).square().mean()
    y.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any("activation_dtype" in vars(m) for m in fk.densify_(model).modules())


def test_a_group_norm_refuses_float64() -> None:
    with pytest.raises(TypeError, match=r"activation_dtype: torch.bfloat16 .* got x of dtype torch.float64"):
        group_norm(torch.randn(4, 6, 5, 7).double(), 3, activation_dtype=BF16)
    model = Grouped().double()
    model.conv.float()
    masks = {"conv": torch.rand(8, 3, 3, 3) < 0.3}
    with pytest.raises(TypeError, match=r"activation_dtype: torch.bfloat16 .* but 'norm' is float64"):
        fk.sparsify_(model, masks, activation_dtype=BF16)
