# SPDX-License-Identifier: Apache-2.0
"""Conversion of whole models: what becomes what, where masks come from, what is refused, and the way back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fedpai_kernels as fk
from fedpai_kernels.nn import (
    BatchLastBatchNorm2d,
    BatchLastConv2d,
    BatchLastMaxPool2d,
    DeferrableBatchNorm2d,
    MaskedConv2d,
    MaskedLinear,
    SparseConv2d,
    SparseLinear,
)
from tests.nn.small import DENSITY, Small, fingerprint, masked_model


def compare(dense: nn.Module, sparse: nn.Module, masks: dict[str, Tensor]) -> None:
    """Outputs and gradients of both agree, in training mode."""
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    y1, y2 = dense(x), sparse(x)
    torch.testing.assert_close(y2, y1)
    dy = torch.randn_like(y1)
    dense.zero_grad()
    sparse.zero_grad()
    y1.backward(dy)
    y2.backward(dy)
    theirs = dict(dense.named_parameters())
    for name, p in sparse.named_parameters():
        if name.endswith(".values"):
            layer = name.removesuffix(".values")
            torch.testing.assert_close(p.grad, theirs[f"{layer}.weight"].grad[masks[layer]])
        else:
            torch.testing.assert_close(p.grad, theirs[name].grad)


@pytest.mark.usefixtures("dense_from_eight_tenths")
def test_what_becomes_what() -> None:
    model, masks = masked_model()
    dense = copy.deepcopy(model)
    report = fk.sparsify_(model, masks, compact=False)
    expected = {
        "stem": MaskedConv2d,
        "norm1": DeferrableBatchNorm2d,
        "relu1": nn.ReLU,
        "pool1": BatchLastMaxPool2d,
        "conv": SparseConv2d,
        "norm2": DeferrableBatchNorm2d,
        "plain": BatchLastConv2d,
        "pool2": fk.nn.BatchLastAvgPool2d,
        "pool3": fk.nn.BatchLastAdaptiveAvgPool2d,
        "hidden": SparseLinear,
        "head": MaskedLinear,
    }
    assert {name: type(module) for name, module in model.named_children()} == expected
    assert [row.name for row in report] == ["stem", "conv", "plain", "hidden", "head"]
    assert [row.kernel for row in report] == ["dense", "sparse", "dense", "sparse", "dense"]
    assert report["plain"].reason == "no mask"
    assert report["conv"].nnz == int(masks["conv"].sum())
    assert report["conv"].density == pytest.approx(report["conv"].nnz / masks["conv"].numel())
    compare(dense, model, masks)


def test_the_report_prints_and_serialises() -> None:
    model, masks = masked_model()
    report = fk.sparsify_(model, masks)
    text = str(report)
    for row in report:
        assert any(row.name in line and row.reason in line for line in text.splitlines())
    assert "fused: 1" in text
    data = json.loads(report.to_json())
    assert [row["name"] for row in data["rows"]] == [row.name for row in report]
    assert len(report) == 5


def test_activations_are_batch_last_from_the_first_layer_to_the_last() -> None:
    model, masks = masked_model()
    fk.sparsify_(model, masks)
    seen: dict[str, bool] = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda m, i, y, name=name: seen.update({name: fk.is_batch_last(y)})  # type: ignore[misc]
        )
    model(torch.randn(6, 3, 8, 8, dtype=torch.float64))
    assert all(seen[name] for name in seen if name != "head")


def test_modules_keep_identity_hooks_and_attributes() -> None:
    model, masks = masked_model()
    conv, bias = model.conv, model.conv.bias
    calls: list[int] = []
    handle = model.conv.register_forward_hook(lambda *_: calls.append(1))
    model.conv.tag = "mine"  # type: ignore[assignment]
    model.norm2.eval()
    model.stem.weight.requires_grad_(False)
    fk.sparsify_(model, masks)
    assert model.conv is conv
    assert model.conv.bias is bias
    assert model.conv.tag == "mine"
    assert not model.norm2.training
    assert model.conv.training
    assert not model.stem.values.requires_grad
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    handle.remove()
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert calls == [1]


def test_fuse_off() -> None:
    model, masks = masked_model()
    dense = copy.deepcopy(model)
    fk.sparsify_(model, masks, fuse=False, compact=False)
    assert type(model.norm1) is BatchLastBatchNorm2d
    assert type(model.relu1) is nn.ReLU
    compare(dense, model, masks)


def test_filter() -> None:
    model, masks = masked_model()
    report = fk.sparsify_(
        model, masks, filter_fn=lambda module, name: name not in ("hidden", "norm2", "plain")
    )
    assert type(model.hidden) is nn.Linear
    assert type(model.norm2) is nn.BatchNorm2d
    assert type(model.plain) is nn.Conv2d
    assert report["hidden"].reason == "left out by filter_fn"


@pytest.mark.usefixtures("dense_from_eight_tenths")
def test_without_a_sparse_convolution_nothing_becomes_batch_last() -> None:
    model, masks = masked_model()
    fk.sparsify_(model, {name: masks[name] for name in ("stem", "hidden")})
    assert type(model.norm1) is nn.BatchNorm2d
    assert type(model.plain) is nn.Conv2d
    assert isinstance(model.stem, MaskedConv2d)
    assert model.stem(torch.randn(2, 3, 8, 8, dtype=torch.float64)).is_contiguous()


def test_masks_from_exact_zeros() -> None:
    model, masks = masked_model()
    nn.init.zeros_(model.plain.weight)  # an initialisation, not a mask
    dense = copy.deepcopy(model)
    report = fk.sparsify_(model, compact=False)
    assert {row.name for row in report if row.density < 1} == set(DENSITY)
    compare(dense, model, masks)


def test_masks_from_prune() -> None:
    model, _ = masked_model()
    model.load_state_dict(
        {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )
    model.norm1.running_var.fill_(1)
    model.norm2.running_var.fill_(1)
    prune.l1_unstructured(model.conv, "weight", amount=0.7)
    prune.random_unstructured(model.hidden, "weight", amount=0.95)
    masks = {name: model.get_submodule(name).weight_mask.bool() for name in ("conv", "hidden")}
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    expected = copy.deepcopy(model.eval()(x).detach())
    copied = fk.sparsify(model)  # prune leaves tensors that deepcopy alone refuses
    assert prune.is_pruned(model.conv)
    fk.sparsify_(model)
    for converted in (copied, model):
        assert not prune.is_pruned(converted)
        assert torch.equal(converted.conv.mask, masks["conv"])
        assert [n for n, _ in converted.conv.named_parameters()] == ["values", "bias"]
        assert not list(converted.conv.buffers())
        torch.testing.assert_close(converted(x), expected)


def test_a_given_mask_overrides_prune() -> None:
    model, masks = masked_model()
    prune.random_unstructured(model.conv, "weight", amount=0.1)
    fk.sparsify_(model, masks)
    assert torch.equal(model.conv.mask, masks["conv"])


def test_weights_outside_of_the_mask_are_dropped() -> None:
    model = Small()
    mask = torch.rand(model.conv.weight.shape) < 0.1
    before = model.conv.weight.detach().clone()
    fk.sparsify_(model, {"conv": mask})
    assert torch.equal(model.conv.weight, before * mask)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
def test_masks_of_ones_and_zeros(dtype: torch.dtype) -> None:
    model, masks = masked_model()
    fk.sparsify_(model, {name: mask.to(dtype) for name, mask in masks.items()})
    assert torch.equal(model.conv.mask, masks["conv"])


@pytest.mark.usefixtures("dense_from_eight_tenths")
def test_a_new_mask_for_a_sparse_layer() -> None:
    model, masks = masked_model()
    fk.sparsify_(model, masks, compact=False)
    before = model.conv.weight.detach().clone()
    new = torch.rand(before.shape) < 0.2
    report = fk.sparsify_(model, {"conv": new}, compact=False)
    assert torch.equal(model.conv.mask, new)
    assert torch.equal(model.conv.weight, before * new)
    assert torch.equal(model.hidden.mask, masks["hidden"])
    assert report["hidden"].reason == "as it was"
    denser = torch.ones_like(new)
    fk.sparsify_(model, {"conv": denser}, compact=False)
    assert isinstance(model.conv, MaskedConv2d)
    assert model.conv.batch_last is False or fk.is_batch_last(model.conv(torch.randn(2, 8, 4, 4).double()))


def test_twice_changes_nothing() -> None:
    model, masks = masked_model()
    fk.sparsify_(model, masks)
    before = fingerprint(model)
    fk.sparsify_(model)
    assert fingerprint(model) == before


def test_a_copy() -> None:
    model, masks = masked_model()
    before = fingerprint(model)
    converted = fk.sparsify(model, masks, compact=False)
    assert fingerprint(model) == before
    assert isinstance(converted.conv, SparseConv2d)
    compare(model, converted, masks)


def test_the_way_back() -> None:
    model, masks = masked_model()
    dense = copy.deepcopy(model)
    fk.sparsify_(model, masks)
    again = fk.densify_(model)
    assert again is model
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for key, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(model(x), dense(x))
    assert not any("plan" in m.__dict__ or "batch_last" in m.__dict__ for m in model.modules())


def test_a_model_that_is_a_single_layer() -> None:
    layer = nn.Conv2d(4, 6, 3)
    mask = torch.rand(layer.weight.shape) < 0.3
    fk.sparsify_(layer, {"": mask})
    assert isinstance(layer, SparseConv2d)
    fk.densify_(layer)
    assert type(layer) is nn.Conv2d


def test_a_module_used_under_two_names() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    mask = torch.rand(layer.weight.shape) < 0.2
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense[0].weight.mul_(mask)
    fk.sparsify_(model, {"2": mask})
    assert model[0] is model[2]
    x = torch.randn(2, 4, 5, 5)
    model(x).sum().backward()
    dense(x).sum().backward()
    torch.testing.assert_close(model[0].values.grad, dense[0].weight.grad[mask], rtol=1e-4, atol=1e-5)


def test_modules_that_share_a_weight() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second)
    mask = torch.rand(8, 8) < 0.1
    mask[0, 0] = True
    with pytest.raises(ValueError, match="'0' and '2' share one weight"):
        fk.sparsify_(copy.deepcopy(model), {"0": mask})
    with pytest.raises(ValueError, match="share one weight"):
        fk.sparsify_(copy.deepcopy(model), {"0": mask, "2": ~mask})
    fk.sparsify_(model, {"0": mask, "2": mask})
    assert model[0].values is model[2].values
    fk.densify_(model)
    assert model[0].weight is model[2].weight


def test_other_precisions_stay_dense() -> None:
    model, masks = masked_model()
    model.to(torch.bfloat16)
    report = fk.sparsify_(model, masks)
    assert {row.kernel for row in report} == {"dense"}
    assert "bfloat16" in report["conv"].reason
    assert model(torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
