# SPDX-License-Identifier: Apache-2.0
"""Compacted networks compute, train and store what the masked ones do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fedpai_kernels as fk
from fedpai import pruning
from fedpai.models.resnet import ResNet
from fedpai_kernels.nn import PackedWeight, parts_of
from fedpai_kernels.nn.removed import original_shape
from tests.nn.compaction import NETWORKS, apply, check_same, check_tensors, network, step, train

EVERY = pytest.mark.parametrize("name", NETWORKS)


def removed_layers(report: fk.Report) -> dict[str, tuple[int, ...]]:
    return {row.name: row.shape for row in report if row.original_shape is not None}


@EVERY
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
def test_forward_and_backward_in_double(name: str, fuse: bool) -> None:
    dense, masks, x = network(name)
    compacted = copy.deepcopy(dense)
    report = fk.sparsify_(compacted, masks, fuse=fuse, compact=True)
    assert len(removed_layers(report)) >= 0.7 * len(report)
    assert sum(p.numel() for p in compacted.parameters()) < sum(
        p.numel() for p in fk.sparsify(dense, masks, compact=False).parameters()
    )
    check_same(dense, compacted, x, rtol=1e-9, atol=1e-9)


@EVERY
def test_training_with_weight_decay(name: str) -> None:
    dense, masks, x = network(name)
    compacted = fk.sparsify(dense, masks, compact=True)
    before = {key: value.clone() for key, value in compacted.state_dict().items()}
    expected, losses = train(dense, x, 5, masks), train(compacted, x, 5)
    torch.testing.assert_close(losses, expected, rtol=1e-8, atol=1e-8)
    assert losses[-1] < losses[0]
    check_tensors(dense, compacted, rtol=1e-7, atol=1e-8)
    for path, module in compacted.named_modules():
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            if original_shape(module) is None or getattr(module, tensor, None) is None:
                continue
            for positions, aside in parts_of(module, tensor)[1:]:
                assert torch.equal(aside, before[f"{path}.{tensor}"].reshape(-1)[positions])
    dense.eval()
    compacted.eval()
    torch.testing.assert_close(compacted(x), dense(x), rtol=1e-7, atol=1e-7)


@EVERY
def test_state_dicts_have_the_original_shapes(name: str) -> None:
    dense, masks, x = network(name)
    compacted = fk.sparsify(dense, masks, compact=True)
    check_state(compacted.state_dict(), dense.state_dict())
    train(compacted, x, 2)
    state = compacted.state_dict()
    again = copy.deepcopy(dense)
    again.load_state_dict(state)  # strict
    check_same(again, compacted, x, rtol=1e-9, atol=1e-9)
    fresh = fk.sparsify(dense, masks, compact=True)
    fresh.load_state_dict(state)
    check_state(fresh.state_dict(), state)
    other = fk.sparsify(dense, masks, compact=False)
    other.load_state_dict(state)
    check_state(other.state_dict(), state)


def check_state(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


@EVERY
def test_the_way_back(name: str) -> None:
    dense, masks, x = network(name)
    converted = copy.deepcopy(dense)
    fk.sparsify_(converted, masks, compact=True)
    check_state(fk.densify_(converted).state_dict(), dense.state_dict())
    assert repr(converted) == repr(dense)
    assert {n: p.shape for n, p in converted.named_parameters()} == {
        n: p.shape for n, p in dense.named_parameters()
    }
    assert not any("_removed" in m.__dict__ for m in converted.modules())
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in converted.modules())
    fk.sparsify_(converted, masks, compact=True)
    train(converted, x, 2)
    state = {key: value.clone() for key, value in converted.state_dict().items()}
    check_state(fk.densify_(converted).state_dict(), state)


@EVERY
def test_copies_and_pickles(name: str) -> None:
    dense, masks, x = network(name)
    compacted = fk.sparsify(dense, masks, compact=True)
    state, expected = copy.deepcopy(compacted.state_dict()), step(compacted, x)
    for twin in (copy.deepcopy(compacted), pickle.loads(pickle.dumps(compacted))):
        twin.load_state_dict({key: value * 2 for key, value in state.items()})
        twin.load_state_dict(state)
        for ours, theirs in zip(step(twin, x), expected, strict=True):
            assert torch.equal(ours, theirs)
        twin.load_state_dict({key: value * 3 for key, value in state.items()})
        check_state(fk.densify_(twin).state_dict(), {key: value * 3 for key, value in state.items()})
    for key, value in compacted.named_parameters():
        if not key.endswith(".values"):
            path, _, tensor = key.rpartition(".")
            positions = parts_of(compacted.get_submodule(path), tensor)[0][0]
            assert torch.equal(value.reshape(-1), state[key].reshape(-1)[positions])


@EVERY
def test_again_with_other_masks(name: str) -> None:
    dense, masks, x = network(name)
    compacted = fk.sparsify(dense, masks, compact=True)
    inner = {key: mask & (torch.rand(mask.shape) < 0.9) for key, mask in masks.items()}
    inner = {key: mask if mask.any() else masks[key] for key, mask in inner.items()}
    fk.sparsify_(compacted, inner, compact=True)
    once = fk.sparsify(dense, inner, compact=True)
    check_state(compacted.state_dict(), once.state_dict())
    assert [p.shape for p in compacted.parameters()] == [p.shape for p in once.parameters()]
    for ours, theirs in zip(step(compacted, x), step(once, x), strict=True):
        assert torch.equal(ours, theirs)
    everything = {key: torch.ones_like(mask) for key, mask in masks.items()}
    fk.sparsify_(compacted, everything, compact=True)
    for module in compacted.modules():
        assert original_shape(module) is None
        assert not isinstance(module, PackedWeight) or module.plan.density == 1


def test_in_single_with_rounded_activations() -> None:
    dense, masks, x = network("resnet18", torch.float32)
    exact = fk.sparsify(dense, masks, compact=True)
    rounded = fk.sparsify(dense, masks, activation_dtype=torch.bfloat16, compact=True)
    y, dx = step(copy.deepcopy(exact), x)
    ours, grad = step(rounded, x)
    assert torch.equal(ours, y)
    torch.testing.assert_close(grad, dx, rtol=0.1, atol=0.05 * float(dx.abs().max()))
    check_same(dense, exact, x, rtol=1e-3, atol=1e-3)


def test_whole_networks_of_channel_masks_become_dense_and_small() -> None:
    """Masks that keep the first quarter of all channels: what is left is the narrow network."""
    model, narrow = ResNet(18, width=0.5), ResNet(18, width=0.125)
    shapes = {
        name: m.weight.shape for name, m in narrow.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    masks = {}
    for name, shape in shapes.items():
        masks[name] = torch.zeros_like(model.get_submodule(name).weight, dtype=torch.bool)
        masks[name][tuple(slice(n) for n in shape)] = True
    report = fk.sparsify_(model, masks, compact=True)
    assert {row.name: row.shape for row in report} == {name: tuple(shape) for name, shape in shapes.items()}
    assert [p.numel() for p in model.parameters()] == [p.numel() for p in narrow.parameters()]
    total = sum(2 ** (stage + 5) * (4 + (stage > 0)) for stage in range(4)) + 32
    assert f"compacted: {3 * total // 4} of {total + 10} channels removed in 20 of 21 layers" in report.notes


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "conv4", "mlp"])
def test_channel_masks_of_a_criterion_leave_full_layers(name: str) -> None:
    _, _, x = network(name)
    dense = NETWORKS[name]()
    masks = pruning.prune(dense, 0.9, "magnitude", structure="channel", seed=1)
    apply(dense.double(), masks)
    compacted = copy.deepcopy(dense)
    report = fk.sparsify_(compacted, masks, compact=True)
    assert {row.density for row in report} == {1.0}
    assert {row.structure for row in report if row.original_shape is not None} == {"channel"}
    assert sum(row.nnz for row in report) == sum(int(mask.sum()) for mask in masks.values())
    check_same(dense, compacted, x, rtol=1e-9, atol=1e-9)
    check_state(fk.densify_(fk.sparsify(dense, masks, compact=True)).state_dict(), dense.state_dict())
