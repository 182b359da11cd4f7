# SPDX-License-Identifier: Apache-2.0
"""BatchLastGroupNorm behaves as GroupNorm, and networks of it convert as those of batch norm do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai.models.resnet import ResNet
from fedpai_kernels.nn import (
    BatchLastGroupNorm,
    BatchLastInstanceNorm2d,
    DeferrableGroupNorm,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "not_affine": {"affine": False},
    "large_eps": {"eps": 0.5},
}


def pair(groups: int = 2, **settings: Any) -> tuple[nn.GroupNorm, BatchLastGroupNorm]:
    plain = nn.GroupNorm(groups, 6, **settings).double()
    if plain.affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    ours = BatchLastGroupNorm(groups, 6, **settings).double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_both_modes(settings: dict[str, Any], groups: int) -> None:
    plain, ours = pair(groups, **settings)
    for training in (True, False):
        plain.train(training)
        ours.train(training)
        x = torch.randn(7, 6, 4, 3, dtype=torch.float64) * 2 + 1
        x1, x2 = x.clone().requires_grad_(), fk.to_batch_last(x).requires_grad_()
        y1, y2 = plain(x1), ours(x2)
        assert fk.is_batch_last(y2)
        dy = torch.randn_like(y1)
        y1.backward(dy)
        y2.backward(dy)
        torch.testing.assert_close(y2, y1)
        torch.testing.assert_close(x2.grad, x1.grad)
    for p1, p2 in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p2.grad, p1.grad)


def test_other_inputs_take_torch_s_path_bit_for_bit() -> None:
    plain, ours = pair()
    x = torch.randn(7, 6, 4, 3, dtype=torch.float64)
    others = (x, x.contiguous(memory_format=torch.channels_last), x[:0], x[0, :, 0, :].t(), x.unsqueeze(2))
    for source in others:
        assert torch.equal(ours(source), plain(source))
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert half(fk.to_batch_last(x).to(torch.bfloat16)).dtype == torch.bfloat16


def test_errors_are_torch_s() -> None:
    plain, ours = pair(groups=6)
    for module in (plain, ours):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(torch.zeros(1, 6, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="weight: expected shape"):
        ours(fk.to_batch_last(torch.zeros(2, 12, 3, 3, dtype=torch.float64)))


def test_is_a_group_norm_and_travels() -> None:
    plain, ours = pair()
    assert isinstance(ours, nn.GroupNorm)
    x = fk.to_batch_last(torch.randn(7, 6, 4, 3, dtype=torch.float64))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), ours(x))
    plain.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("tracking", [False, True], ids=["plain", "running_statistics"])
@pytest.mark.parametrize("affine", [False, True], ids=["bare", "affine"])
def test_instance_norm(affine: bool, tracking: bool) -> None:
    plain = nn.InstanceNorm2d(6, affine=affine, track_running_stats=tracking).double()
    ours = BatchLastInstanceNorm2d(6, affine=affine, track_running_stats=tracking).double()
    for module in (plain, ours):
        for i, p in enumerate(module.parameters()):
            nn.init.constant_(p, 0.5 + i)
    for training in (True, False):
        x = torch.randn(7, 6, 4, 3, dtype=torch.float64)
        x1, x2 = x.clone().requires_grad_(), fk.to_batch_last(x).requires_grad_()
        y1, y2 = plain.train(training)(x1), ours.train(training)(x2)
        assert tracking or fk.is_batch_last(y2)
        dy = torch.randn_like(y1)
        y1.backward(dy)
        y2.backward(dy)
        torch.testing.assert_close(y2, y1)
        torch.testing.assert_close(x2.grad, x1.grad)
        for source in (x, x[0]):
            assert torch.equal(ours(source), plain(source))
    for p1, p2 in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p2.grad, p1.grad)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        ours.train()(fk.to_batch_last(torch.zeros(3, 6, 1, 1, dtype=torch.float64)))


# ---- conversion
# ----------------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Group norms before a ReLU module, before a function, before a sum, and read by a product; other norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu1 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(4, 8),
            nn.ReLU(inplace=True),
        )
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(1, 8)
        self.conv3, self.norm3 = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(8, 8)
        self.conv4, self.norm4 = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8, affine=False)
        self.bn, self.relu2, self.instance = nn.BatchNorm2d(8), nn.ReLU(), nn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.norm3(self.conv3(x)) + x)
        x = self.norm4(self.conv4(x))
        return self.instance(self.relu2(self.bn(x * x)))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(m.weight.shape, generator=draw) < 0.3
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }


def masked(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with zeros outside of its masks, and norms with parameters that do something."""
    masks = masks_of(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in masks:
                module.weight.mul_(masks[name])
            elif isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model, masks


def test_report_and_the_way_back() -> None:
    model, masks = masked(Mixed())
    before = {name: type(m) for name, m in model.named_modules()}
    report = fk.sparsify_(model, masks)
    assert "batch-last: 4 GroupNorm, 1 BatchNorm2d, 1 InstanceNorm2d" in report.notes
    assert "fused: 2 group norms with the ReLU after them" in report.notes
    assert "fused: 1 batch norms with the ReLU after them" in report.notes
    (alone,) = (note for note in report.notes if note.startswith("not fused"))
    assert "norm3 (followed by add)" in alone
    assert "norm4 (followed by mul)" in alone
    assert {type(m) for m in (model.norm1, model.norm2)} == {DeferrableGroupNorm}
    assert {type(m) for m in (model.norm3, model.norm4)} == {BatchLastGroupNorm}
    fk.densify_(model)
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_filter_fn_leaves_a_group_norm_as_it_is() -> None:
    model, masks = masked(Mixed())
    report = fk.sparsify_(model, masks, filter_fn=lambda module, name: name != "norm1")
    assert type(model.norm1) is nn.GroupNorm
    assert type(model.relu1) is nn.ReLU
    assert any("norm1 (left out by filter_fn)" in note for note in report.notes)


def of_group_norms(model: nn.Module, groups: int) -> nn.Module:
    """`model` with a GroupNorm in place of every BatchNorm2d."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(groups, child.num_features))
    return model


def outcome(model: nn.Module, x: Tensor, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, and gradients at the weights that are there."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    found = {"y": y.detach(), "d x": leaf.grad}
    for name, p in model.named_parameters():
        layer, _, last = name.rpartition(".")
        if last == "values" or (layer in masks and last == "weight"):
            gradient = p.grad if last == "values" else p.grad[masks[layer]]
            found[f"d {layer}.weight"] = gradient.clone()
        else:
            found[f"d {name}"] = p.grad.clone()
    model.zero_grad()
    return found


MODELS: dict[str, Any] = {
    "mixed": Mixed,
    "resnet18": lambda: of_group_norms(ResNet(18, width=0.125), 4),
    "resnet18_layer_norms": lambda: of_group_norms(ResNet(18, width=0.125), 1),
}
EVERY = pytest.mark.parametrize("name", MODELS)


@EVERY
def test_in_double_it_is_the_dense_network(name: str) -> None:
    dense, masks = masked(MODELS[name]().double())
    fused, unfused = fk.sparsify(dense, masks), fk.sparsify(dense, masks, fuse=False)
    for training in (True, False):
        x = torch.randn(11, 3, 16, 16, dtype=torch.float64)
        expected, ours, apart = (outcome(m.train(training), x, masks) for m in (dense, fused, unfused))
        assert ours.keys() == expected.keys()
        for key, value in ours.items():
            torch.testing.assert_close(
                value, expected[key], rtol=1e-8, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}"
            )
            assert torch.equal(value, apart[key]), key


@EVERY
def test_in_single_it_errs_no_more_than_dense_torch(name: str) -> None:
    """max error <= 2 x that of dense torch in float32 (3 x for gradients), plus a floor."""
    exact, masks = masked(MODELS[name]().double())
    single = copy.deepcopy(exact).float()
    exact = copy.deepcopy(single).double()
    sparse = fk.sparsify(single, masks)
    x = torch.randn(11, 3, 16, 16)
    theirs, ours = (outcome(m, x, masks) for m in (single, sparse))
    expected = outcome(exact, x.double(), masks)
    for key, value in ours.items():
        reference = expected[key]
        floor = 64 * torch.finfo(torch.float32).eps * float(reference.abs().max())
        limit = (3 if key.startswith("d ") else 2) * float((theirs[key] - reference).abs().max()) + floor
        assert float((value - reference).abs().max()) <= limit, key


def test_activations_stay_batch_last_from_end_to_end() -> None:
    model, masks = masked(of_group_norms(ResNet(18, width=0.125), 4))
    fk.sparsify_(model, masks)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert {type(m) for m in norms} <= {BatchLastGroupNorm, DeferrableGroupNorm}
    seen: list[bool] = []
    for m in norms:
        m.register_forward_hook(
            lambda m, args, y: seen.append(fk.is_batch_last(args[0]) and fk.is_batch_last(y))
        )
    model(torch.randn(5, 3, 16, 16))
    assert len(seen) == len(norms) == 20
    assert all(seen)


def test_pickles_copies_and_state_dicts() -> None:
    dense, masks = masked(of_group_norms(ResNet(18, width=0.125), 4))
    sparse = fk.sparsify(dense, masks)
    x = torch.randn(5, 3, 16, 16)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(twin(x), sparse(x))
    dense.load_state_dict(sparse.state_dict())
    again = fk.densify_(copy.deepcopy(sparse))
    assert {type(m) for m in again.modules()} == {type(m) for m in dense.modules()}
    assert torch.equal(again(x), dense(x))
