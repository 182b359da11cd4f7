# SPDX-License-Identifier: Apache-2.0
"""Batch norm from tensors to the CUDA kernels' arguments, with a library whose device is the CPU: the ops by
themselves, in :func:`batch_norm` and in fused chains, against long double and against torch. What needs a GPU is in
test_cuda_norm_gpu.py."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.cuda import conv2d as cuda_conv2d
from fedpai_kernels.cuda import norm as cuda_norm
from fedpai_kernels.ops import norm, norm_conv2d, norm_kernels
from fedpai_kernels.ops.activation import Activation
from tests.ops.activations import ALL
from tests.ops.norms import check, upstream

SHAPES = {
    "n_is_1": (1, 3, 5, 5),
    "two_values_per_channel": (2, 1, 1, 1),
    "n_not_multiple": (65, 3, 9, 7),
    "rows_of_fours": (64, 4, 8, 4),
    "rows_in_pieces": (64, 1, 40, 40),
}


@pytest.fixture
def on_cuda(on_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of ops/ call what is registered for CUDA tensors, on tensors of the CPU."""
    replaced: dict[ModuleType, dict[str, Any]] = {
        norm: {
            "batch_norm_train": cuda_norm._train,
            "batch_norm_eval": cuda_norm._eval,
            "batch_norm_backward": cuda_norm._backward,
        },
        norm_conv2d: {
            "batch_norm_statistics": cuda_norm._statistics,
            "given_statistics": cuda_norm._given_statistics,
            "batch_norm_backward_": cuda_norm._backward_in_place,
            "_norm_conv2d_forward": cuda_norm._norm_conv2d_forward,
            "_norm_conv2d_weight_grad": cuda_norm._norm_conv2d_weight_grad,
            "conv2d_input_grad": cuda_conv2d.input_grad,
            "has_backward": lambda t: False,
        },
    }
    for module, names in replaced.items():
        for name, function in names.items():
            monkeypatch.setattr(module, name, function)
    monkeypatch.setitem(norm_kernels.DTYPES, "cpu", norm_kernels.DTYPES["cuda"])


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "sum"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rounded(shape: tuple[int, ...], training: bool, relu: bool, residual: bool) -> None:
    torch.manual_seed(0)
    x = fk.to_batch_last(torch.randn(shape) * 2 + 0.5)
    check(x, upstream("batch_last", x), training, relu, torch.randn(shape) if residual else None)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("kind", ["contiguous", "expanded", "sliced"])
def test_any_strides(kind: str) -> None:
    torch.manual_seed(0)
    x = fk.to_batch_last(torch.randn(9, 4, 5, 6))
    check(x, upstream(kind, x), True, True)


def differentiated(f: Any, x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, *([] if r is None else [r]))]
    y = f(leaves[0], leaves[3] if r is not None else None, leaves[1], leaves[2])
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("name", ["none", *ALL])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "sum"])
def test_activations_of_bfloat16(name: str, training: bool, residual: bool) -> None:
    """Against float64, with the derivative where the rounded result of a sum has it; parameters stay float32."""
    torch.manual_seed(0)
    activation, dense = ALL.get(name, (Activation("none"), lambda y: y))
    x, r, dy = (torch.randn(12, 3, 5, 4).bfloat16() for _ in range(3))
    weight, bias, mean, var = torch.randn(3), torch.randn(3), torch.randn(3), torch.rand(3) + 0.5
    added = r if residual else None

    def ours(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        return norm.batch_norm(x, mean, var, weight, bias, training, activation=activation, residual=r)

    def exact(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.batch_norm(x, before[0], before[1], weight, bias, training)
        return dense(y if r is None else y + r)

    before = [mean.double(), var.double()]
    got = differentiated(ours, x, added, weight, bias, dy)
    wide = [None if t is None else t.double() for t in (x, added, weight, bias, dy)]
    expected = differentiated(exact, *wide)
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * residual
    for value, truth in zip(got, expected, strict=True):
        # Half a step for the result, and as much for the gradient of the activation, in each of the terms of a sum.
        limit = 2**-8 * (float(truth.abs().max()) + float(dy.abs().max())) * (1 if value.dim() == 4 else 8)
        off = (value.double() - truth).abs()
        # An element just below 6 lies on the other side where it was rounded.
        assert int((off > limit).sum()) <= (name == "relu6" and residual), off.max()
    if training:
        torch.testing.assert_close(mean.double(), before[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), before[1], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
def test_running_statistics_in_the_same_launch(momentum: float) -> None:
    """With the bits of torch's lerp; one of them may be missing."""
    torch.manual_seed(0)
    x, mean, var = fk.to_batch_last(torch.randn(8, 3, 4, 4)), torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    y, stats = cuda_norm._train_running(x, None, None, None, mean, var, momentum, 1e-5, 1)
    plain, same = cuda_norm._train(x, None, None, None, 1e-5, 1)
    assert torch.equal(y, plain)
    assert torch.equal(stats, same)
    torch.testing.assert_close(mean, before[0].lerp(stats[0], momentum), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(var, before[1].lerp(stats[2], momentum), rtol=1e-7, atol=1e-7)
    alone = before[1].clone()
    cuda_norm._train_running(x, None, None, None, None, alone, momentum, 1e-5, 1)
    assert torch.equal(alone, var)
    with pytest.raises(ValueError, match=r"^running_var: .*contiguous.*\(2,\)"):
        cuda_norm._train_running(x, None, None, None, mean, torch.ones(6)[::2], momentum, 1e-5, 1)


class Block(nn.Module):
    """Every place where a norm is computed with what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)
        return F.silu(self.norm3(self.conv3(y)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fused_chains(training: bool, request: pytest.FixtureRequest) -> None:
    """A converted block gives what it gives with the CPU's kernels."""
    torch.manual_seed(0)
    block = Block()
    masks = {f"conv{i}": torch.rand(getattr(block, f"conv{i}").weight.shape) < 0.4 for i in (1, 2, 3)}
    fk.sparsify_(block, masks)
    block.train(training)
    x, dy = torch.randn(8, 4, 6, 6), torch.randn(8, 4, 6, 6)

    def step(model: nn.Module) -> list[Tensor]:
        given = x.clone().requires_grad_()
        y = model(given)
        y.backward(dy)
        assert given.grad is not None
        return [y, given.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]

    expected = step(copy.deepcopy(block))
    request.getfixturevalue("on_cuda")
    calls = []
    forward = ((cuda_norm, name) for name in ("_run_train", "_applied"))
    for module, name in (*forward, (norm, "batch_norm_backward"), (norm_conv2d, "batch_norm_backward_")):
        original = getattr(module, name)
        request.getfixturevalue("monkeypatch").setattr(
            module, name, lambda *a, _name=name, _run=original: (calls.append(_name), _run(*a))[1]
        )
    got = step(block)
    backward = {"batch_norm_backward", "batch_norm_backward_"}
    assert set(calls) == {"_applied", *backward} | ({"_run_train"} if training else set())
    for value, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_norm_and_convolution_have_the_bits_of_both(activation: str) -> None:
    """The registered ops for CUDA, one after the other and as one."""
    torch.manual_seed(0)
    code = Activation(activation).code
    plan = fk.Plan.from_mask(torch.rand(5, 4, 3, 3) < 0.3)
    x, values, weight, bias = torch.randn(8, 4, 6, 6), torch.randn(plan.nnz), torch.randn(4), torch.randn(4)
    dy, geometry = torch.randn(8, 5, 6, 6), [1, 1, 1, 1, 1, 1, 1, 1]
    y, stats = cuda_norm._train(x, None, weight, bias, 1e-5, code)
    assert torch.equal(stats, cuda_norm._statistics(x, 1e-5))
    pair = cuda_norm._norm_conv2d_forward(x, stats, weight, bias, code, values, None, plan.handle, geometry)
    assert torch.equal(pair, torch.ops.fedpai.conv2d_forward(y, values, None, plan.handle, geometry))
    grads = cuda_norm._norm_conv2d_weight_grad(x, stats, weight, bias, code, dy, plan.handle, True, geometry)
    both = torch.ops.fedpai.conv2d_weight_grad(y, dy, plan.handle, True, geometry)
    assert all(map(torch.equal, grads, both))


@pytest.mark.usefixtures("on_cuda")
def test_dtypes_that_do_not_go_together() -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"^weight: expected torch.float32 with an x of torch.bfloat16, got"):
        norm.batch_norm(x, weight=torch.ones(3).bfloat16(), training=True)
    with pytest.raises(TypeError, match=r"^residual: expected the dtype of x, torch.bfloat16, got torch.float32"):
        norm.batch_norm(x, residual=x.float(), training=True)
    with pytest.raises(TypeError, match=r"^x: expected dtype float32 or bfloat16, got torch.float16"):
        norm.batch_norm(x.half(), training=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_versions_know_the_dtypes(dtype: torch.dtype) -> None:
    """Shapes, strides and dtypes of what the ops return."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = fk.empty_batch_last((8, 3, 4, 5), dtype=dtype, device="cuda")
        p = torch.empty(3, device="cuda")
        y, stats = torch.ops.fedpai.batch_norm_train(x, None, p, p, 1e-5, 1)
        again, same = torch.ops.fedpai.batch_norm_train_running(x, None, p, p, p, p, 0.1, 1e-5, 1)
        dx, affine, _ = torch.ops.fedpai.batch_norm_backward(y, x, None, p, p, stats, True, 1, True, True, False)
        for t in (y, again, dx):
            assert (t.dtype, t.device.type, fk.is_batch_last(t)) == (dtype, "cuda", True)
        for t, rows in ((stats, 3), (same, 3), (affine, 2)):
            assert (t.dtype, tuple(t.shape)) == (torch.float32, (rows, 3))
