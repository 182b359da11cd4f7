# SPDX-License-Identifier: Apache-2.0
"""Models that keep their activations as bfloat16: what is saved, how exact gradients are, who remembers the setting."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fedpai_kernels as fk
from fedpai_kernels import memory
from fedpai_kernels.nn import (
    BatchLastBatchNorm2d,
    BatchLastConv2d,
    BatchLastGroupNorm,
    BatchLastInstanceNorm2d,
    SparseConv2d,
    SparseLinear,
)
from fedpai_kernels.nn import conv2d as nn_conv2d
from fedpai_kernels.ops import stored
from tests.nn.small import fingerprint
from tests.nn.storing import BF16, MASKED, Network, gradients, images, masks_of, network, saved_by

FUSE = pytest.mark.parametrize("fuse", [True, False], ids=["fused", "not_fused"])


# ---- what is kept
# ----------------------------------------------------------------------------------------------------------------


@FUSE
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_all_that_is_saved_is_bfloat16(fuse: bool, training: bool) -> None:
    model = network(fuse=fuse).train(training)
    if fuse:
        assert all(t.dtype in (BF16, torch.int32) for t in saved_by(model, images()))
    else:  # torch's own ReLU keeps its result
        ours = [t for t in saved_by(model, images()) if t.dtype != torch.float32]
        assert [t.dtype for t in ours].count(BF16) >= 7
    assert not any(t.dtype == BF16 for t in saved_by(network(None, fuse=fuse).train(training), images()))


def test_what_two_functions_save_is_one_copy() -> None:
    """The block's result, by its norm's ReLU and by the next convolution; the shortcut's likewise."""
    saved = saved_by(network(), images())
    copies = [t.data_ptr() for t in saved if t.dtype == BF16]
    plain = [t.data_ptr() for t in saved_by(network(None), images()) if t.dtype == torch.float32]
    assert len(copies) == len(plain)
    assert len(copies) > len(set(copies)) == len(set(plain))


@pytest.mark.skipif(not memory.ENABLED, reason=f"{memory.VARIABLE}=0")
def test_memory_between_the_passes_is_half_and_is_given_back() -> None:
    x, live = torch.randn(64, 3, 32, 32), {}
    for dtype in (None, BF16):
        model = network(dtype)
        F.cross_entropy(model(x), torch.zeros(64, dtype=torch.long)).backward()
        gc.collect()
        before = fk.memory_stats().live_bytes
        loss = F.cross_entropy(model(x), torch.zeros(64, dtype=torch.long))
        live[dtype] = fk.memory_stats().live_bytes - before
        loss.backward()
        assert fk.memory_stats().live_bytes == before  # while the loss is still here
    assert live[BF16] < 0.6 * live[None]


def test_nothing_is_stored_where_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(stored._C, "round_to_bf16", lambda *a: calls.append(a))
    model = network()
    with torch.no_grad():
        model(images())
    with torch.inference_mode():
        model(images())
    model.requires_grad_(False)(images())
    assert calls == []


def test_only_the_weights_gradient_needs_the_input_of_a_convolution() -> None:
    conv = SparseConv2d.from_dense(nn.Conv2d(3, 4, 3), torch.rand(4, 3, 3, 3) < 0.5)
    conv.activation_dtype = BF16
    conv.values.requires_grad_(False)
    x = images().requires_grad_()
    assert saved_by(conv, x) == []
    conv(x).sum().backward()
    assert x.grad is not None


# ---- gradients
# ----------------------------------------------------------------------------------------------------------------


@FUSE
def test_the_forward_pass_and_the_statistics_have_the_same_bits(fuse: bool) -> None:
    ours, plain = network(fuse=fuse), network(None, fuse=fuse)
    for training in (True, True, False):
        assert torch.equal(ours.train(training)(images()), plain.train(training)(images()))
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@FUSE
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_are_near(isa: str, walk: str, fuse: bool, training: bool) -> None:
    ours, plain = network(fuse=fuse).train(training), network(None, fuse=fuse).train(training)
    expected = gradients(plain, images(33))
    scale = max(float(g.norm()) for g in expected.values())
    for name, g in gradients(ours, images(33)).items():
        error = float((g - expected[name]).norm())
        assert error <= 0.01 * float(expected[name].norm()) + 1e-4 * scale, name
    assert any(not torch.equal(g, expected[n]) for n, g in gradients(ours, images(33)).items())


def test_gradients_repeat_bit_by_bit() -> None:
    model = network()
    first, second = gradients(model, images()), gradients(model, images())
    assert all(torch.equal(first[name], second[name]) for name in first)


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    conv, linear = nn.Conv2d(5, 6, 3, padding=1, groups=1), nn.Linear(40, 7)
    full = BatchLastConv2d(5, 6, 3)
    return {
        "conv2d": (SparseConv2d.from_dense(conv, torch.rand(6, 5, 3, 3) < 0.4), (17, 5, 6, 7)),
        "linear": (SparseLinear.from_dense(linear, torch.rand(7, 40) < 0.4), (17, 40)),
        "full": (full, (17, 5, 6, 7)),
        "norm": (BatchLastBatchNorm2d(5), (17, 5, 6, 7)),
        "group_norm": (BatchLastGroupNorm(2, 6), (17, 6, 6, 7)),
        "instance_norm": (BatchLastInstanceNorm2d(5, affine=True), (17, 5, 6, 7)),
    }


def run(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in module.named_parameters()}}


@pytest.mark.parametrize("kind", ["conv2d", "linear", "full", "norm", "group_norm", "instance_norm"])
def test_a_module_by_itself_on_numbers_that_bfloat16_holds(isa: str, kind: str) -> None:
    """Bit by bit what it computes without the setting, for upstream gradients of any strides."""
    module, shape = layers()[kind]
    x = fk.to_batch_last(torch.randint(-9, 10, shape).float())
    like = torch.randn_like(module(x).detach())
    assert module.activation_dtype is None
    for dy in (like, like.contiguous(), like[:1].expand_as(like)):
        module.activation_dtype = None
        expected = run(module, x, dy)
        module.activation_dtype = BF16
        for name, value in run(module, x, dy).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", ["conv2d", "linear", "full"])
def test_a_layers_gradients_are_those_of_rounded_input(isa: str, walk: str, kind: str) -> None:
    module, shape = layers()[kind]
    x = fk.to_batch_last(torch.randn(shape))
    dy = torch.randn_like(module(x).detach())
    expected = {**run(module, x.to(BF16).float(), dy), "y": module(x)}
    module.activation_dtype = BF16
    for name, value in run(module, x, dy).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_norms_gradients_are_those_of_rounded_input_and_exact_statistics(
    isa: str, relu: bool, with_residual: bool
) -> None:
    x, residual, dy = (fk.to_batch_last(torch.randn(11, 5, 6, 7)) for _ in range(3))
    weight, bias = torch.randn(5).requires_grad_(), torch.randn(5).requires_grad_()
    x.requires_grad_()
    r = residual.requires_grad_() if with_residual else None
    y = fk.ops.norm.batch_norm(x, None, None, weight, bias, True, relu=relu, residual=r, activation_dtype=BF16)
    y.backward(dy)
    rounded = x.detach().to(BF16).float()
    z = y.detach() if relu and with_residual else None
    stats = torch.ops.fedpai.batch_norm_statistics(x.detach(), 1e-5)
    dx, affine, dr = torch.ops.fedpai.batch_norm_backward(
        dy, rounded, z, weight.detach(), bias.detach(), stats, True, relu, True, True, z is not None
    )
    assert torch.equal(x.grad, dx)
    assert torch.equal(weight.grad, affine[0])
    assert torch.equal(bias.grad, affine[1])
    if r is not None:
        assert torch.equal(r.grad, dr if relu else dy)


def test_gradients_of_gradients_are_refused_by_name() -> None:
    for module, shape in layers().values():
        x = fk.to_batch_last(torch.randn(shape)).requires_grad_()
        module.activation_dtype = BF16
        with pytest.raises(RuntimeError, match=r"activation_dtype: gradients of gradients .* activation_dtype=None"):
            torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        module.activation_dtype = None
        (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        assert g.requires_grad
    model = network()
    with pytest.raises(RuntimeError, match="activation_dtype: gradients of gradients"):
        torch.autograd.grad(model(images()).sum(), model.conv2.values, create_graph=True)


def test_a_second_backward_pass() -> None:
    model, x = network(), images()
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(model.parameters()))))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, list(model.parameters()))


# ---- changes in place
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize("kind", ["conv2d", "linear", "norm", "group_norm", "instance_norm"])
def test_an_input_that_changes_is_noticed(kind: str, dtype: torch.dtype | None) -> None:
    module, shape = layers()[kind]
    module.activation_dtype = dtype
    x = fk.to_batch_last(torch.randn(shape))
    y = module(x).sum()
    x.view_as(x).add_(1)  # a view counts as well
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dtype", [None, BF16])
def test_a_result_that_changes_is_noticed(dtype: torch.dtype | None) -> None:
    x, residual = (fk.to_batch_last(torch.randn(11, 5, 6, 7)).requires_grad_() for _ in range(2))
    y = fk.ops.norm.batch_norm(x, training=True, relu=True, residual=residual, activation_dtype=dtype)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- surroundings
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(use_reentrant: bool) -> None:
    def run_model(again: bool) -> tuple[dict[str, Tensor], Network]:
        model, x = network(), images().requires_grad_()
        y = checkpoint(model, x, use_reentrant=use_reentrant) if again else model(x)
        F.cross_entropy(y, torch.arange(9)).backward()
        return {"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}, model

    (ours, _), (expected, _) = run_model(True), run_model(False)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_under_torch_func_activations_stay_as_they_are() -> None:
    nn_conv2d._full_plan.cache_clear()  # that of the first layer is then made under torch.func
    model, plain = network().eval(), network(None).eval()

    def gradient(m: nn.Module) -> dict[str, Tensor]:
        values = {n: p.detach() for n, p in m.named_parameters()}
        return torch.func.grad(lambda v: torch.func.functional_call(m, v, images()).square().sum())(values)

    ours, expected = gradient(model), gradient(plain)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_norm_and_a_convolution_of_different_settings_are_not_computed_in_one(together: list[bool]) -> None:
    model = network()
    model(images())
    assert together == [True]
    model.conv2.activation_dtype = None
    saved = saved_by(model, images())
    assert together == [True]
    assert [t.dtype for t in saved if t.shape[1] == 12] == [BF16, torch.float32]


# ---- the setting
# ----------------------------------------------------------------------------------------------------------------


def settings(model: nn.Module) -> dict[str, Any]:
    return {n: m.activation_dtype for n, m in model.named_modules() if hasattr(m, "activation_dtype")}


def test_off_by_default() -> None:
    model = Network()
    report = fk.sparsify_(model, masks_of(model))
    assert set(settings(model).values()) == {None}
    assert "activations" not in str(report)
    assert all(row.activation_dtype is None for row in report)


@FUSE
def test_the_report_says_it(fuse: bool) -> None:
    model = Network()
    report = fk.sparsify_(model, masks_of(model), activation_dtype=BF16, fuse=fuse)
    assert set(settings(model)) == {"stem", "norm", "norm1", "norm2", *MASKED}
    assert set(settings(model).values()) == {BF16}
    assert "activations kept in bfloat16: by 1 BatchLastConv2d" in str(report)
    assert {row.name for row in report if row.activation_dtype == "bfloat16"} == {"stem", *MASKED}
    assert '"activation_dtype": "bfloat16"' in report.to_json()


@pytest.mark.usefixtures("dense_from_eight_tenths")
def test_without_sparse_layers_it_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    report = fk.sparsify_(model, {"0": torch.ones(4, 3, 3, 3, dtype=torch.bool)}, activation_dtype=BF16)
    assert "activations kept in bfloat16: by no module, as nothing is sparse" in str(report)


def test_copies_and_pickles_remember() -> None:
    model = network()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = gradients(model, images())
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert settings(other) == settings(model)
        found = gradients(other, images())
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert network(None).load_state_dict(model.state_dict(), strict=True)
    original = Network()
    assert set(settings(fk.sparsify(original, masks_of(original), activation_dtype=BF16)).values()) == {BF16}
    assert settings(original) == {}


def test_densify_forgets() -> None:
    model = fk.densify_(network())
    assert settings(model) == {}
    assert not any("activation_dtype" in vars(m) for m in model.modules())
    assert type(network().conv1.to_dense()) is nn.Conv2d
    assert "activation_dtype" not in vars(network().conv1.to_dense())


def test_another_conversion_decides_anew_where_it_may() -> None:
    model = network()
    fk.sparsify_(model, {"conv1": model.conv1.mask}, filter_fn=lambda module, name: name != "conv2")
    assert settings(model) == {**dict.fromkeys(settings(model)), "conv2": BF16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, "bf16"])
def test_other_dtypes_change_nothing(dtype: Any) -> None:
    model = Network()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"^activation_dtype: expected None .* or torch\.bfloat16, got"):
        fk.sparsify_(model, masks_of(model), activation_dtype=dtype)
    assert fingerprint(model) == before
    ours = network()
    ours.conv1.activation_dtype = dtype
    with pytest.raises(ValueError, match=r"^activation_dtype: expected None"):
        ours(images())


def test_float64_models_are_refused() -> None:
    model = Network().double()
    before = fingerprint(model)
    with pytest.raises(TypeError, match=r"activation_dtype: torch.bfloat16 .* but 'stem' is float64"):
        fk.sparsify_(model, masks_of(model), activation_dtype=BF16)
    assert fingerprint(model) == before
    with pytest.raises(TypeError, match=r"activation_dtype: torch.bfloat16 .* got x of dtype torch.float64"):
        network().double()(images().double())
