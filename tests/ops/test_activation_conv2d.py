# SPDX-License-Identifier: Apache-2.0
"""conv2d(activation(batch_norm(x))) as one: bit for bit the two separate ones, and dense-masked torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels import Plan
from fedpai_kernels.ops import norm_conv2d as norm_conv2d_module
from fedpai_kernels.ops.conv2d import sparse_conv2d
from fedpai_kernels.ops.norm import batch_norm
from fedpai_kernels.ops.norm_conv2d import norm_conv2d
from tests.ops.activations import ALL, BY_NAME
from tests.ops.norms import upstream
from tests.ops.test_norm_conv2d import gradients, operands

PLAN = Plan.from_mask(torch.rand(9, 7, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3)
NAME = pytest.mark.parametrize("name", [name for name in ALL if name != "relu"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 7, 8, 17, 33])
@TRAINING
@NAME
def test_one_operation_against_two(
    isa: str, walk: str, batch: int, training: bool, name: str, dtype: torch.dtype
) -> None:
    """Bit for bit, with borders, strides and a batch that fills the vectors or does not."""
    together, apart = (operands((batch, 7, 6, 5), PLAN, dtype) for _ in range(2))
    geometry = {"padding": 1, "stride": 1 + batch % 2}
    o, given = together, BY_NAME[name]
    y = norm_conv2d(
        o.x, o.mean, o.var, o.weight, o.bias, training, 0.1, 1e-5, o.values, PLAN, o.conv_bias, **geometry,
        activation=given,
    )  # fmt: skip
    o = apart
    h = batch_norm(o.x, o.mean, o.var, o.weight, o.bias, training, 0.1, 1e-5, activation=given)
    expected = sparse_conv2d(h, o.values, PLAN, o.conv_bias, **geometry)
    assert torch.equal(y, expected)
    dy = upstream("sliced", y).to(dtype)
    ours, theirs = gradients(y, together, dy), gradients(expected, apart, dy)
    for key, gradient in theirs.items():
        assert torch.equal(ours[key], gradient), key
    assert torch.equal(together.mean, apart.mean)
    assert torch.equal(together.var, apart.var)


@TRAINING
@NAME
def test_in_double_it_is_dense_masked_torch(isa: str, walk: str, training: bool, name: str) -> None:
    o = operands((10, 7, 8, 8), PLAN, torch.float64)
    mean, var = o.mean.clone(), o.var.clone()
    y = norm_conv2d(
        o.x, o.mean, o.var, o.weight, o.bias, training, 0.1, 1e-5, o.values, PLAN, o.conv_bias, padding=1,
        activation=BY_NAME[name],
    )  # fmt: skip
    h = ALL[name][1](F.batch_norm(o.x, mean, var, o.weight, o.bias, training, 0.1, 1e-5))
    expected = F.conv2d(h, PLAN.unpack(o.values), o.conv_bias, padding=1)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    ours, theirs = gradients(y, o, dy), gradients(expected, o, dy)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-10, atol=1e-10, msg=key)
    torch.testing.assert_close(o.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(o.var, var, rtol=1e-12, atol=1e-12)


@NAME
def test_padding_stays_zero(isa: str, walk: str, name: str) -> None:
    """It pads the activated image: no shift, and no activation of it."""
    mask = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 0] = True  # the left neighbour in channel 0
    plan, x = Plan.from_mask(mask), torch.randn(5, 2, 3, 4)
    mean, var, bias = torch.zeros(2), torch.ones(2), torch.full((2,), -0.5)
    y = norm_conv2d(
        fk.to_batch_last(x), mean, var, None, bias, False, 0.1, 0.0, torch.ones(1), plan, padding=1,
        activation=BY_NAME[name],
    )  # fmt: skip
    assert torch.equal(y[:, 0, :, 0], torch.zeros(5, 3))
    torch.testing.assert_close(y[:, 0, :, 1:], ALL[name][1](x[:, 0, :, :-1] - 0.5))


@NAME
@TRAINING
def test_gradients_of_gradients(training: bool, name: str) -> None:
    plan = Plan.from_mask(torch.rand(3, 2, 3, 3) < 0.5)
    o = operands((3, 2, 4, 4), plan, torch.float64)

    def f(*leaves: torch.Tensor) -> torch.Tensor:
        x, weight, bias, values, conv_bias = leaves
        mean, var = o.mean.clone(), o.var.clone()
        return norm_conv2d(
            x, mean, var, weight, bias, training, 0.1, 1e-5, values, plan, conv_bias, padding=1,
            activation=BY_NAME[name],
        )  # fmt: skip

    leaves = (o.x, o.weight, o.bias, o.values, o.conv_bias)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("wanted", ["x", "weight", "values", "x values", "bias conv_bias"])
@pytest.mark.parametrize("name", ["leaky_relu", "gelu"])
@TRAINING
def test_only_what_needs_a_gradient_gets_one(
    walk: str, wanted: str, name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(names: str) -> dict[str, torch.Tensor | None]:
        o = operands((9, 7, 6, 5), PLAN)
        leaves = {k: t for k, t in o._asdict().items() if k not in ("mean", "var")}
        for key, t in leaves.items():
            t.requires_grad_(key in names.split())
        y = norm_conv2d(
            o.x, o.mean, o.var, o.weight, o.bias, training, 0.1, 1e-5, o.values, PLAN, o.conv_bias,
            activation=BY_NAME[name],
        )  # fmt: skip
        y.backward((torch.arange(y.numel()) % 7 - 3.0).view(y.shape))  # sums of these are exact in any order
        return {k: t.grad for k, t in leaves.items()}

    with monkeypatch.context() as patch:
        if wanted == "values":  # has a walk of its own, whose sums have another order than those of one for both
            patch.setattr(norm_conv2d_module, "has_backward", lambda t: False)
        complete = some("x weight bias values conv_bias")
    for key, gradient in some(wanted).items():
        if key in wanted.split():
            assert torch.equal(gradient, complete[key]), key
        else:
            assert gradient is None, key
